"""What this machine offers: cores and memory, with the limits of a container."""

import os
from dataclasses import dataclass
from pathlib import Path

import psutil

CGROUP = Path("/sys/fs/cgroup")
# Where a control group says what memory it may take and has taken, in bytes, and what of that are cached files:
# version 2, then version 1.
_MEMORY_FILES = (
    ("memory.max", "memory.current", "memory.stat", ("inactive_file", "active_file")),
    (
        "memory/memory.limit_in_bytes",
        "memory/memory.usage_in_bytes",
        "memory/memory.stat",
        ("total_inactive_file", "total_active_file"),
    ),
)


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


def quota_cores(quota: str, period: str) -> int | None:
    """Whole cores that a control group's quota in each period allows, at least one; None for no limit."""
    return None if quota in ("max", "-1") else max(1, int(quota) // int(period))


def _cores_of_group(cgroup: Path) -> int | None:
    cpu = _read(cgroup / "cpu.max")  # version 2; version 1 has a file for each
    cpu = cpu or _read(cgroup / "cpu/cpu.cfs_quota_us") + _read(cgroup / "cpu/cpu.cfs_period_us")
    return quota_cores(*cpu) if len(cpu) == 2 else None


def _memory_of_group(cgroup: Path) -> int | None:
    """Bytes that a control group's limit leaves; None for no limit. Cached files give way, so they count as free."""
    for limit_file, used_file, stat_file, cached_names in _MEMORY_FILES:
        limit, used = _read(cgroup / limit_file), _read(cgroup / used_file)
        if limit and used and limit[0] != "max":
            stat = _read(cgroup / stat_file)
            sizes = dict(zip(stat[::2], stat[1::2], strict=False))
            cached = sum(int(sizes.get(name, 0)) for name in cached_names)
            return max(0, int(limit[0]) - int(used[0]) + cached)
    return None


def look_at_machine(cgroup: Path = CGROUP) -> Machine:
    """Ask the operating system; a container's limits count where they are tighter."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = psutil.virtual_memory().available
    limit = _memory_of_group(cgroup)
    return Machine(
        num_cores=min(cores, _cores_of_group(cgroup) or cores),
        memory_bytes=memory if limit is None else min(memory, limit),
    )
