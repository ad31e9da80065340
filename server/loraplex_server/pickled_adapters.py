"""Adapters with pickled weights, for operators who trust them: converted in a process of its own, by weights only."""

import subprocess
import sys
from pathlib import Path

from loraplex_models.adapters.manifest import WEIGHTS_FILE, ManifestError
from loraplex_models.sources import ADAPTER_FILES, PICKLE_FILE
from loraplex_server.adapter_store import AdapterStore, store_key


def is_pickled(folder: Path) -> bool:
    """Whether a folder has pickled weights and no others."""
    return (folder / PICKLE_FILE).is_file() and not (folder / WEIGHTS_FILE).is_file()


def unpickled(folder: Path, store: AdapterStore, timeout_s: float) -> Path:
    """A folder of the store with the same adapter as safetensors; the same file is converted once.

    Raises ManifestError; OSError when the disk refuses.
    """
    found = (folder / PICKLE_FILE).stat()
    key = store_key("pickle", str(folder), str(found.st_size), str(found.st_mtime_ns))
    return store.build(key, lambda staging: _convert(folder, staging, timeout_s))


def _convert(folder: Path, staging: Path, timeout_s: float) -> None:
    converted = staging / "converted"
    command = [sys.executable, "-P", "-m", "loraplex_models.adapters.unpickle", str(folder), str(converted)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=max(timeout_s, 1), check=False)
    except subprocess.TimeoutExpired:
        raise ManifestError(f"{PICKLE_FILE} could not be converted within {timeout_s:.0f} s") from None
    if done.returncode == 1 and done.stdout:
        raise ManifestError(done.stdout.strip())
    if done.returncode:
        raise ManifestError(f"{PICKLE_FILE} broke its reader (exit code {done.returncode})")
    for name in ADAPTER_FILES:
        (converted / name).rename(staging / name)
    converted.rmdir()
