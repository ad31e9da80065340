"""The host tier of one rank: threads read checked files, and bring weights to the device, while steps go on."""

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Generic, Literal, TypeVar

from loraplex_models.adapters.manifest import ManifestError
from loraplex_models.adapters.merge_recipe import MergeRecipe
from loraplex_models.adapters.row_sums import UnfinishedWeights
from loraplex_models.adapters.slots import PreparedAdapter
from loraplex_models.adapters.weights import AdapterWeights

# Two readers hide each other's disk waits; more would take cores from the model.
NUM_READERS = 2

_Loaded = TypeVar("_Loaded")


@dataclass(frozen=True, slots=True)
class FinishedLoad:
    """A load into the host or the device tier that has ended: the weights' size in host memory, or why it failed.

    One that is `unfinished` has ended on this rank only, and goes on when the ranks have exchanged what it needs.
    """

    digest: str
    tier: Literal["host", "device"]
    num_bytes: int
    error: str | None
    seconds: float = 0.0  # from when a thread took it up
    device_bytes: int | None = None  # what weights in host memory will take on the device, where only they tell
    unfinished: UnfinishedWeights | None = None


@dataclass(frozen=True, slots=True)
class _Timed(Generic[_Loaded]):
    """What a thread has made, and when it began and ended."""

    made: _Loaded
    began: float
    ended: float


class HostCache:
    """Weights in host memory by digest, and those that threads have brought to the device but no slot has yet.

    `read` turns a folder, or a recipe, into weights and must give the digest asked for; `arrange` lays them out in host
    memory; `prepare` has them brought to the device; `drop` gives back the memory of what these two gave, if nobody has
    taken it. All threads call `begin_thread` first.
    """

    def __init__(
        self,
        read: Callable[[str | MergeRecipe], AdapterWeights | UnfinishedWeights],
        arrange: Callable[[AdapterWeights], AdapterWeights],
        prepare: Callable[[AdapterWeights], PreparedAdapter],
        drop: Callable[[AdapterWeights | PreparedAdapter], None],
        begin_thread: Callable[[], None] = lambda: None,
    ):
        self._read = read
        self._arrange = arrange
        self._prepare = prepare
        self._drop = drop
        self._weights: dict[str, AdapterWeights] = {}
        self._prepared: dict[str, PreparedAdapter] = {}
        self._reading: dict[str, Future[_Timed[AdapterWeights | UnfinishedWeights]]] = {}
        self._preparing: dict[str, Future[_Timed[PreparedAdapter]]] = {}
        self._arriving: dict[str, _Timed[PreparedAdapter]] = {}
        self._readers = ThreadPoolExecutor(NUM_READERS, thread_name_prefix="adapter-reader", initializer=begin_thread)
        # A thread of its own: a short copy to the device never waits behind slow files.
        self._preparer = ThreadPoolExecutor(1, thread_name_prefix="adapter-preparer", initializer=begin_thread)

    def load(self, digest: str, source: str | MergeRecipe) -> None:
        """Start reading or merging in the background."""
        self._reading[digest] = self._readers.submit(_timed, partial(self._read_and_arrange, source))

    def go_on(self, weights: AdapterWeights, seconds: float) -> None:
        """Finish a load that was reported as unfinished, after that time, in the background."""
        self._reading[weights.digest] = self._readers.submit(_timed, partial(self._arrange, weights), seconds)

    def prepare(self, digest: str) -> None:
        """Start to bring weights that were reported as loaded to the device, in the background."""
        self._preparing[digest] = self._preparer.submit(_timed, partial(self._prepare, self._weights[digest]))

    def take_prepared(self, digest: str) -> PreparedAdapter:
        """Hand over what was reported as on the device."""
        return self._prepared.pop(digest)

    def forget(self, digest: str, tier: Literal["host", "device"]) -> None:
        """Undo a load into that tier, which another rank could not do."""
        found = (self._weights if tier == "host" else self._prepared).pop(digest, None)
        if found is not None:
            self._drop(found)

    def evict(self, digest: str) -> None:
        """Give the memory back."""
        self.forget(digest, "host")

    def get(self, digest: str) -> AdapterWeights:
        """Weights that were reported as loaded."""
        return self._weights[digest]

    def finished(self) -> list[FinishedLoad]:
        """Loads that ended since the last call; never waits."""
        finished: list[FinishedLoad] = []
        if self._reading:
            read = [digest for digest, future in self._reading.items() if future.done()]
            finished += [self._finish_read(digest, self._reading.pop(digest)) for digest in read]
        if self._preparing:
            prepared = [digest for digest, future in self._preparing.items() if future.done()]
            failed = [self._note_prepared(digest, self._preparing.pop(digest)) for digest in prepared]
            finished += [load for load in failed if load is not None]
        if self._arriving:
            arrived = [digest for digest, one in self._arriving.items() if one.made.has_arrived()]
            finished += [self._finish_arrival(digest) for digest in arrived]
        return finished

    def close(self) -> None:
        """Stop the threads."""
        self._readers.shutdown(cancel_futures=True)
        self._preparer.shutdown(cancel_futures=True)

    def _read_and_arrange(self, source: str | MergeRecipe) -> AdapterWeights | UnfinishedWeights:
        weights = self._read(source)
        return weights if isinstance(weights, UnfinishedWeights) else self._arrange(weights)

    def _finish_read(self, digest: str, future: Future[_Timed[AdapterWeights | UnfinishedWeights]]) -> FinishedLoad:
        try:
            timed = future.result()
        except (ManifestError, ValueError) as error:
            return FinishedLoad(digest, "host", 0, str(error))
        except RuntimeError as error:  # torch, when no more memory can be pinned for a GPU
            return FinishedLoad(digest, "host", 0, f"it cannot be laid out in host memory: {error}")
        except (OSError, MemoryError) as error:
            return FinishedLoad(digest, "host", 0, f"its files cannot be read: {error.__class__.__name__}")
        weights, seconds = timed.made, timed.ended - timed.began
        if weights.digest != digest:
            if not isinstance(weights, UnfinishedWeights):
                self._drop(weights)
            reason = "its files have changed since they were checked; load it again under its name"
            return FinishedLoad(digest, "host", 0, reason)
        if isinstance(weights, UnfinishedWeights):
            return FinishedLoad(digest, "host", 0, None, seconds, unfinished=weights)
        self._weights[digest] = weights
        return FinishedLoad(digest, "host", weights.num_bytes, None, seconds, weights.device_bytes)

    def _note_prepared(self, digest: str, future: Future[_Timed[PreparedAdapter]]) -> FinishedLoad | None:
        """Wait for an adapter whose copies were launched, or say why they were not."""
        try:
            self._arriving[digest] = future.result()
        except (ValueError, MemoryError, RuntimeError) as error:  # RuntimeError: torch, when the device's memory is out
            return FinishedLoad(digest, "device", 0, f"it cannot be brought to the device: {error}")
        return None

    def _finish_arrival(self, digest: str) -> FinishedLoad:
        timed = self._arriving.pop(digest)
        self._prepared[digest] = timed.made
        seconds = time.perf_counter() - timed.began
        return FinishedLoad(digest, "device", self._weights[digest].num_bytes, None, seconds)


def _timed(work: Callable[[], _Loaded], seconds_before: float = 0.0) -> _Timed[_Loaded]:
    began = time.perf_counter() - seconds_before
    return _Timed(work(), began, time.perf_counter())
