"""What all tests share: one thread a process, and how they are dealt to processes.

Where there is no GPU, Triton runs its kernels in its interpreter; it must be told before it is first imported, which
transformers does. Where there is one, the same tests run the kernels compiled.
"""

import gc
import os
from pathlib import Path
from typing import Any

import pytest

# Tests beside each other do not wait for each other's spinning.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")

TESTS = Path(__file__).parent


# What the processes of pytest-xdist begin with: servers, which compile the kernels if these are new, and beside them
# what needs no kernel. Then what takes long, so that all end at about the same time.
FIRST = ("e2e", "server/api")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Keep a file in one process, and all servers in one: they want a core of their own."""
    from xdist.scheduler import LoadScopeScheduling  # where tests run in one process, it need not be installed

    class FileScheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return "e2e" if "/e2e/" in file else file

    return FileScheduling(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the tests into the order in which files are dealt."""
    items.sort(key=_turn)


def pytest_collection_finish() -> None:
    """Take what modules have made out of the garbage collector's sight: it stays, and to look at it takes 0.4 s."""
    gc.collect()
    gc.freeze()


def _turn(item: pytest.Item) -> tuple[int, bool]:
    path = _path(item)
    place = next((place for place, folder in enumerate(FIRST) if path.startswith(folder + "/")), len(FIRST))
    return place, item.get_closest_marker("slow") is None


def _path(item: pytest.Item) -> str:
    return item.path.relative_to(TESTS).as_posix()
