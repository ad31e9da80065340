"""What this machine offers: cores and memory, with the limits of a container."""

import os
from dataclasses import dataclass
from pathlib import Path

import psutil

CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True, slots=True)
class Machine:
    """Cores that this process may use and the memory that is free for it."""

    num_cores: int
    memory_bytes: int


def _read(path: Path) -> list[str]:
    try:
        return path.read_text().split()
    except OSError:
        return []


def quota_cores(cpu_max: list[str]) -> int | None:
    """Whole cores that a cgroup's cpu.max («quota period») allows, at least one; None for no limit."""
    if len(cpu_max) != 2 or cpu_max[0] == "max":
        return None
    return max(1, int(cpu_max[0]) // int(cpu_max[1]))


def look_at_machine(cgroup: Path = CGROUP) -> Machine:
    """Ask the operating system; a container's limits count where they are tighter."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = quota_cores(_read(cgroup / "cpu.max"))
    memory = psutil.virtual_memory().available
    limit, used = _read(cgroup / "memory.max"), _read(cgroup / "memory.current")
    if limit and used and limit[0] != "max":
        memory = min(memory, max(0, int(limit[0]) - int(used[0])))
    return Machine(num_cores=min(cores, quota or cores), memory_bytes=memory)
