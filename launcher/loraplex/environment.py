"""The report of `loraplex env`: what a maintainer asks for first."""

import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version

import loraplex
from loraplex_server.machine import look_at_machine

PACKAGES = (
    "torch",
    "numpy",
    "safetensors",
    "tokenizers",
    "huggingface_hub",
    "transformers",
    "peft",
    "starlette",
    "uvicorn",
    "sse-starlette",
    "pydantic",
    "msgspec",
    "pyzmq",
    "triton",
)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _gpus() -> list[str]:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return ["no nvidia-smi"]
    query = [tool, "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    result = subprocess.run(query, capture_output=True, text=True, timeout=10, check=False)
    return result.stdout.strip().splitlines() or [f"nvidia-smi: exit code {result.returncode}"]


def report() -> str:
    """Versions, cores, memory and devices, a line each."""
    machine = look_at_machine()
    lines = [
        f"loraplex: {loraplex.__version__}",
        f"python: {platform.python_version()} ({platform.python_implementation()})",
        f"system: {platform.platform()}",
        f"cores: {machine.num_cores}",
        f"free memory: {machine.memory_bytes / 1024**3:.1f} GiB",
        *(f"gpu: {gpu}" for gpu in _gpus()),
        *(f"{package}: {_version(package)}" for package in PACKAGES),
    ]
    return "\n".join(lines)
