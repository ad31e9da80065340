"""Environments of their own for clients and tools whose pins do not go with ours, built once and kept."""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
FOLDER = REPOSITORY / ".cache" / "clients"
# Name of an environment → what is installed there; the tools' own requirements stay free.
PYTHON_PACKAGES = {
    "legacy": ("lorax-client==0.6.3", "text-generation==0.7.0"),
    "langchain": ("langchain-huggingface==1.2.3", "langchain-openai==1.7.3"),
    "agents": ("openai-agents==0.24.0",),
    "litellm": ("litellm==1.106.2",),
    "lm-eval": ("lm-eval[api]==0.4.13",),
    "schemathesis": ("schemathesis==4.32.5",),
}
NODE_PACKAGES = ("openai@6.49.0", "@huggingface/inference@4.13.30")


def python_of(name: str) -> str:
    """The interpreter of an environment, which is built if it is not there; "own" is this one."""
    if name == "own":
        return sys.executable
    packages = PYTHON_PACKAGES[name]
    folder = FOLDER / name
    made_of = folder / "made-of"
    if not made_of.is_file() or made_of.read_text() != _digest(packages):
        _say(f"building the environment {name}: {' '.join(packages)}")
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        # An older pip takes minutes to resolve some of them.
        for wanted in (("pip==26.3",), packages):
            subprocess.run([str(folder / "bin" / "pip"), "--quiet", "install", *wanted], check=True)
        made_of.write_text(_digest(packages))
    return str(folder / "bin" / "python")


def node_folder() -> Path | None:
    """The folder with the JavaScript packages; None where there is no node."""
    if shutil.which("node") is None or shutil.which("npm") is None:
        return None
    folder = FOLDER / "node"
    made_of = folder / "made-of"
    if not made_of.is_file() or made_of.read_text() != _digest(NODE_PACKAGES):
        _say(f"installing {' '.join(NODE_PACKAGES)}")
        folder.mkdir(parents=True, exist_ok=True)
        npm = ["npm", "install", "--silent", "--no-audit", "--no-fund", "--prefix", str(folder), *NODE_PACKAGES]
        subprocess.run(npm, check=True)
        made_of.write_text(_digest(NODE_PACKAGES))
    return folder


def clean_environment() -> dict[str, str]:
    """This process's variables without those that would lead another interpreter to our packages."""
    return {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}


def _digest(packages: tuple[str, ...]) -> str:
    return hashlib.sha256("\n".join(packages).encode()).hexdigest()


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
