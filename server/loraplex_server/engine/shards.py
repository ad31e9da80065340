"""Several ranks as one executor: rank 0 sends every plan to the others, which obey it like their own."""

import contextlib
import time
from collections import deque
from dataclasses import replace
from typing import Literal

import msgspec

from loraplex_models.parallel import ParallelGroup, RanksLost
from loraplex_server.engine.adapters.host_cache import FinishedLoad
from loraplex_server.engine.heartbeat import Heartbeat
from loraplex_server.engine.step import StepPlan
from loraplex_server.engine.worker import LaunchedStep, StepResult, Worker

# An idle rank 0 makes sure that often that the others are there.
HEARING_INTERVAL_S = 1.0
# What a rank says of a load that it is asked about; one that is unfinished waits for an exchange.
UNDER_WAY, LOADED, FAILED, UNFINISHED = range(4)
LoadKey = tuple[str, Literal["host", "device"]]  # digest and tier


class AskLoads(msgspec.Struct, frozen=True, tag=True):
    """Say how far these loads of adapters are on your side; all ranks learn all answers."""

    keys: list["LoadKey"]


class EndRanks(msgspec.Struct, frozen=True, tag=True):
    """Nothing more will come."""


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(StepPlan | AskLoads | EndRanks).decode


class GroupExecutor:
    """Rank 0's side: its own worker, and the group that the other ranks' workers are in. See `Executor`."""

    def __init__(self, worker: Worker, group: ParallelGroup):
        self._worker = worker
        self._group = group
        self._loads = _GroupLoads(worker, group)
        self._launched: deque[LaunchedStep] = deque()
        self._heard_at = time.monotonic()  # when all ranks were last known to be there

    def launch(self, plan: StepPlan) -> None:
        """Begin the step, together with the other ranks. Raises RanksLost."""
        self._group.send(_encode(plan))
        self._launched.append(self._worker.launch(plan))
        self._heard_at = time.monotonic()

    def collect(self) -> StepResult:
        """The step's result."""
        return self._launched.popleft().read()

    def finished_loads(self) -> list[FinishedLoad]:
        """Loads of adapters that ended on every rank, or failed on one, since the last call. Raises RanksLost.

        Ranks of which nothing has been heard for a while are asked too: one on another machine may have gone.
        """
        keys = self._loads.look()
        if not keys and time.monotonic() - self._heard_at < HEARING_INTERVAL_S:
            return []
        self._heard_at = time.monotonic()
        self._group.send(_encode(AskLoads(keys)))
        return self._loads.agree(keys)

    def close(self) -> None:
        """Stop the worker's threads and the other ranks."""
        with contextlib.suppress(RanksLost):  # who has gone need not be told
            self._group.send(_encode(EndRanks()))
        self._worker.host_cache.close()


def follow(worker: Worker, group: ParallelGroup, heartbeat: Heartbeat) -> None:
    """The other ranks' side: obey rank 0 until it says that nothing more comes. Raises RanksLost."""
    loads = _GroupLoads(worker, group)
    try:
        while True:
            message = _decode(group.receive())
            with heartbeat.at_work():
                match message:
                    case StepPlan():
                        worker.launch(message)
                    case AskLoads(keys=keys):
                        loads.look()
                        loads.agree(keys)
                    case EndRanks():
                        return
    finally:
        worker.host_cache.close()


class _GroupLoads:
    """One rank's loads that have ended here, and perhaps not yet everywhere."""

    def __init__(self, worker: Worker, group: ParallelGroup):
        self._cache = worker.host_cache
        self._group = group
        self._ended: dict[LoadKey, FinishedLoad] = {}

    def look(self) -> list[LoadKey]:
        """Take in what has ended here; returns all that the ranks have not agreed on."""
        self._ended |= {(load.digest, load.tier): load for load in self._cache.finished()}
        return list(self._ended)

    def agree(self, keys: list[LoadKey]) -> list[FinishedLoad]:
        """Tell the other ranks and hear them: loads that have ended on all of them. One that failed is undone here.

        What is unfinished on all is exchanged, and goes on.
        """
        own = [number for key in keys for number in self._answer(key)]
        answers = [numbers[1:] for numbers in self._group.gather_numbers([self._group.rank, *own])]
        agreed: list[FinishedLoad] = []
        for place, key in enumerate(keys):
            of_ranks = [numbers[3 * place : 3 * place + 3] for numbers in answers]
            if any(state == UNDER_WAY for state, *_ in of_ranks):
                continue
            load = self._ended.pop(key)
            failed = [rank for rank, (state, *_) in enumerate(of_ranks) if state == FAILED]
            if load.unfinished is not None and not failed:
                self._cache.go_on(load.unfinished.finished(self._group), load.seconds)
                continue
            if failed and load.error is None:
                self._cache.forget(*key)
                load = replace(load, num_bytes=0, error=f"rank {failed[0]} could not load it", unfinished=None)
            if not failed:
                # In host memory what all its parts take together; on each device as much as the largest.
                num_bytes = sum(num_bytes for _, num_bytes, _ in of_ranks)
                device_bytes = max(device_bytes for *_, device_bytes in of_ranks)
                load = replace(load, num_bytes=num_bytes, device_bytes=device_bytes or None)
            agreed.append(load)
        return agreed

    def _answer(self, key: LoadKey) -> tuple[int, int, int]:
        """How far a load is, and its bytes on the host and on the device."""
        load = self._ended.get(key)
        if load is None:
            return UNDER_WAY, 0, 0
        if load.unfinished is not None:
            return UNFINISHED, 0, 0
        return (FAILED, 0, 0) if load.error else (LOADED, load.num_bytes, load.device_bytes or 0)
