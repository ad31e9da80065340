"""Threads that share one piece of compiled work after the other, in chunks that each takes as it comes to them.

A decode step is hundreds of pieces of 10 to 100 us. A fixed share a thread (OpenMP) makes all wait for the one that
was interrupted; here the others take its chunks. The leader, the thread that calls, works too and needs nobody: with no
helpers, or with all of them asleep, it does every chunk itself. Helpers watch for the next piece for a while and then
sleep, so that between steps the cores are free.
"""

import functools
import struct
import threading

import numba
import numpy as np
import torch

from loraplex_kernels.cpu.atomics import (
    HAS_TEAMS,
    add,
    call,
    pause,
    read,
    sleep_while,
    swap_if,
    wake,
    write,
    yield_core,
)
from loraplex_kernels.cpu.compiled import CAN_KEEP_CODE, FAST_MATH, jit, kept, longs

# The shared words, in bytes from the first, each on a cache line of its own.
_TICKET = 0  # which piece (upper 32 bits) and how many of its chunks nobody has taken (lower 32 bits)
_PENDING = 64  # chunks not done
_ASLEEP = 128  # helpers that sleep, or are about to
_FIRST = 192  # chunks not done of those that others wait for
_JOB = 256  # the piece: the address of its chunk function, then the numbers that the function reads
MAX_NUMBERS = 26
_JOB_WORDS = 1 + MAX_NUMBERS
_NUM_WORDS = _JOB // 8 + _JOB_WORDS

_LOWER = 0xFFFFFFFF
# How often a helper looks for the next piece before it sleeps: some 100 us, longer than any pause within a step.
_LOOKS = 3000
# How often a thread looks whether the chunks it waits for are done before it lets their thread have the core.
_PATIENCE = 20_000


class ChunkFunction:
    """A function (numbers' address, chunk) that a team calls by its address; compiled when that is first asked for."""

    def __init__(self, function):
        self._function = function

    @functools.cached_property
    def address(self) -> int:
        """Where the compiled code lies."""
        options = {"cache": CAN_KEEP_CODE, "fastmath": FAST_MATH, "error_model": "numpy"}
        compiled = kept(numba.cfunc("void(int64, int64)", **options), self._function)
        self._kept = compiled  # or its code would go
        return int(compiled.address or 0)


@jit
def wait_for_zero(word):
    """Wait until others have counted a word down."""
    looks = 0
    while read(word) > 0:
        looks += 1
        if looks > _PATIENCE:
            yield_core()
        else:
            pause()


@jit
def _take_chunk(words, job):
    """Take and do one chunk; returns whether there was one. `job` is the thread's own copy of the piece."""
    ticket = read(words + _TICKET)
    if ticket & _LOWER == 0:
        return False
    # Copied before the chunk is taken: as long as one is left, nobody may write another piece.
    shared, own = longs(words + _JOB, _JOB_WORDS), longs(job, _JOB_WORDS)
    for i in range(_JOB_WORDS):
        own[i] = shared[i]
    if swap_if(words + _TICKET, ticket, ticket - 1):
        call(own[0], job + 8, (ticket & _LOWER) - 1)
        add(words + _PENDING, -1)
    return True


@jit
def _help(words, job):
    """A helper's life; it ends with the process."""
    looks = 0
    while True:
        if _take_chunk(words, job):
            looks = 0
        elif looks < _LOOKS:
            looks += 1
            pause()
        else:
            looks = 0
            add(words + _ASLEEP, 1)
            ticket = read(words + _TICKET)
            if ticket & _LOWER == 0:
                sleep_while(words + _TICKET + 4, ticket >> 32)
            add(words + _ASLEEP, -1)


@jit
def _lead(words, job, num_chunks, num_first, is_alone):
    """Do the piece that lies at `job`, together with whoever comes; the highest chunk is taken first."""
    own = longs(job, _JOB_WORDS)
    write(words + _FIRST, num_first)
    if is_alone or num_chunks == 1:
        for chunk in range(num_chunks - 1, -1, -1):
            call(own[0], job + 8, chunk)
        return
    shared = longs(words + _JOB, _JOB_WORDS)
    for i in range(_JOB_WORDS):
        shared[i] = own[i]
    write(words + _PENDING, num_chunks)
    piece = ((read(words + _TICKET) >> 32) + 1) & 0x7FFFFFFF
    write(words + _TICKET, (piece << 32) | num_chunks)
    if read(words + _ASLEEP) > 0:
        wake(words + _TICKET + 4)
    while _take_chunk(words, job):
        pass
    wait_for_zero(words + _PENDING)


class Team:
    """The calling thread and `num_threads - 1` helpers. Several threads may call; their pieces go one by one."""

    def __init__(self, num_threads: int):
        self._lock = threading.Lock()
        self._own_job = np.zeros(_JOB_WORDS, np.int64)
        self._own_job_address = self._own_job.ctypes.data
        # The shared words begin on a cache line.
        self._words = np.zeros(_NUM_WORDS + 8, np.int64)
        self._address = self._words.ctypes.data + -self._words.ctypes.data % 64
        self._is_alone = num_threads == 1 or not HAS_TEAMS
        # The word that the chunks counted by `num_first` count down when they are done.
        self.first_word = self._address + _FIRST
        for number in range(1, 1 if self._is_alone else num_threads):
            threading.Thread(target=self._live, name=f"team-{number}", daemon=True).start()

    def run(self, layout: struct.Struct, num_chunks: int, function: int, *numbers: float, num_first: int = 0) -> None:
        """Call `function` for all chunks.

        layout: how the numbers lie, 8 bytes each, the function's address first. num_first: so many chunks, those of the
        highest numbers, are taken before the others, which may wait for them (`wait_for_zero`).
        """
        with self._lock:
            layout.pack_into(self._own_job.data, 0, function, *numbers)
            _lead(self._address, self._own_job_address, num_chunks, num_first, self._is_alone)

    def _live(self) -> None:
        job = np.zeros(_JOB_WORDS, np.int64)
        _help(self._address, job.ctypes.data)


@functools.cache
def process_team() -> Team:
    """The process's team, made at the first use: by then it is settled how many threads the process computes with."""
    return Team(torch.get_num_threads())
