"""A team does every chunk of every piece once, whatever its threads are doing meanwhile."""

import struct
import threading

import numpy as np
import pytest

from loraplex_kernels.cpu.atomics import HAS_TEAMS, add
from loraplex_kernels.cpu.compiled import longs
from loraplex_kernels.cpu.team import ChunkFunction, Team

LAYOUT = struct.Struct("3q")


@ChunkFunction
def _count(numbers, chunk):  # type: ignore[no-untyped-def]
    """Add the piece's number to the chunk's counter, after some work that grows with the chunk."""
    counters, number = longs(numbers, 2)
    busy = 0
    for i in range(chunk * 50):
        busy += i ^ chunk
    add(counters + 8 * chunk, number + (busy & 0))


def run(team: Team, counters: np.ndarray, num_chunks: int, number: int) -> None:
    team.run(LAYOUT, num_chunks, _count.address, counters.ctypes.data, number)


@pytest.mark.parametrize("num_threads", [1, 2, 5])
def test_every_chunk_is_done_once(num_threads: int) -> None:
    team = Team(num_threads)
    assert HAS_TEAMS, "the tests run on Linux and x86-64"
    for num_chunks in (1, 2, 3, 17, 100):
        counters = np.zeros(num_chunks, np.int64)
        for piece in range(1, 201):
            run(team, counters, num_chunks, piece)
            assert (counters == piece * (piece + 1) // 2).all()


def test_pieces_of_several_callers_do_not_mix() -> None:
    team = Team(3)
    all_counters = [np.zeros(20, np.int64) for _ in range(4)]

    def call(counters: np.ndarray) -> None:
        for _ in range(500):
            run(team, counters, len(counters), 1)

    callers = [threading.Thread(target=call, args=(counters,)) for counters in all_counters]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert all((counters == 500).all() for counters in all_counters)


def test_helpers_that_fell_asleep_change_nothing() -> None:
    team, counters = Team(4), np.zeros(40, np.int64)
    waiting = threading.Event()
    for _ in range(20):
        run(team, counters, len(counters), 1)
        waiting.wait(0.005)  # longer than a helper looks for work
    assert (counters == 20).all()
