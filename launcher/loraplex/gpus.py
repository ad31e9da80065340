"""GPUs that the engine can be given: found without torch, which the launcher does not import."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version

import pynvml


@dataclass(frozen=True, slots=True)
class Gpus:
    """How many GPUs the installed torch can use, and why they are fewer than there are."""

    count: int = 0
    note: str | None = None


def find_gpus() -> Gpus:
    """Ask NVIDIA's driver, and the variables that hide GPUs from a process."""
    count = _visible(_num_installed(), os.environ)
    torch = version("torch")
    if count and torch.endswith("+cpu"):
        return Gpus(0, f"{count} GPU visible, not used: torch {torch} is built for the CPU; install a build for CUDA")
    return Gpus(count)


def _num_installed() -> int:
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return 0  # no driver, or one that shows nothing to this process
    try:
        return int(pynvml.nvmlDeviceGetCount())
    finally:
        pynvml.nvmlShutdown()


def _visible(count: int, environment: Mapping[str, str]) -> int:
    """How many of `count` GPUs the variables leave; CUDA takes a list up to its first entry that names none."""
    if (named := environment.get("CUDA_VISIBLE_DEVICES")) is None:
        named = environment.get("NVIDIA_VISIBLE_DEVICES", "all")
    if named == "all":
        return count
    entries = [entry.strip() for entry in named.split(",")]
    for index, entry in enumerate(entries):
        if not entry or entry in ("-1", "none", "void", "NoDevFiles"):
            return min(index, count)
    return min(len(entries), count)
