"""What all tests share: one thread a process, fixed draws, no clock, and how they are dealt to processes.

Where there is no GPU, Triton runs its kernels in its interpreter; it must be told before it is first imported, which
transformers does. Where there is one, the same tests run the kernels compiled.
"""

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# Tests beside each other do not wait for each other's spinning.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")

TESTS = Path(__file__).parent
settings.register_profile("steady", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("steady")


# What the processes of pytest-xdist begin with: servers, which compile the kernels if these are new, and beside them
# what needs no kernel. Then what takes long, so that all end at about the same time.
FIRST = ("e2e", "server/api")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep a file in one process, and all servers in one: they want a core of their own."""
    items.sort(key=_turn)
    for item in items:
        path = _path(item)
        item.add_marker(pytest.mark.xdist_group("e2e" if path.startswith("e2e/") else path))


def _turn(item: pytest.Item) -> tuple[int, bool]:
    path = _path(item)
    place = next((place for place, folder in enumerate(FIRST) if path.startswith(folder + "/")), len(FIRST))
    return place, item.get_closest_marker("slow") is None


def _path(item: pytest.Item) -> str:
    return item.path.relative_to(TESTS).as_posix()
