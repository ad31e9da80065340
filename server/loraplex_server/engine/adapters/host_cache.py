"""The host tier of one rank: threads read checked files, and bring weights to the device, while steps go on."""

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Literal, TypeVar

from loraplex_models.adapters.manifest import ManifestError
from loraplex_models.adapters.merge_recipe import MergeRecipe
from loraplex_models.adapters.slots import PreparedAdapter
from loraplex_models.adapters.weights import AdapterWeights

# Two readers hide each other's disk waits; more would take cores from the model.
NUM_READERS = 2

_Loaded = TypeVar("_Loaded")


@dataclass(frozen=True, slots=True)
class FinishedLoad:
    """A load into the host or the device tier that has ended: the weights' size in host memory, or why it failed."""

    digest: str
    tier: Literal["host", "device"]
    num_bytes: int
    error: str | None
    seconds: float = 0.0  # from when a thread took it up


class HostCache:
    """Weights in host memory by digest, and those that threads have brought to the device but no slot has yet.

    `read` turns a folder, or a recipe, into weights and must give the digest asked for; `prepare` brings weights to the
    device.
    """

    def __init__(
        self, read: Callable[[str | MergeRecipe], AdapterWeights], prepare: Callable[[AdapterWeights], PreparedAdapter]
    ):
        self._read = read
        self._prepare = prepare
        self._weights: dict[str, AdapterWeights] = {}
        self._prepared: dict[str, PreparedAdapter] = {}
        self._reading: dict[str, Future[tuple[AdapterWeights, float]]] = {}
        self._preparing: dict[str, Future[tuple[PreparedAdapter, float]]] = {}
        self._readers = ThreadPoolExecutor(NUM_READERS, thread_name_prefix="adapter-reader")
        # A thread of its own: a short copy to the device never waits behind slow files.
        self._preparer = ThreadPoolExecutor(1, thread_name_prefix="adapter-preparer")

    def load(self, digest: str, source: str | MergeRecipe) -> None:
        """Start reading or merging in the background."""
        self._reading[digest] = self._readers.submit(_timed, partial(self._read, source))

    def prepare(self, digest: str) -> None:
        """Start to bring weights that were reported as loaded to the device, in the background."""
        self._preparing[digest] = self._preparer.submit(_timed, partial(self._prepare, self._weights[digest]))

    def take_prepared(self, digest: str) -> PreparedAdapter:
        """Hand over what was reported as on the device."""
        return self._prepared.pop(digest)

    def forget(self, digest: str, tier: Literal["host", "device"]) -> None:
        """Undo a load into that tier, which another rank could not do."""
        (self._weights if tier == "host" else self._prepared).pop(digest, None)

    def evict(self, digest: str) -> None:
        """Give the memory back."""
        self._weights.pop(digest, None)

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
            finished += [self._finish_prepare(digest, self._preparing.pop(digest)) for digest in prepared]
        return finished

    def close(self) -> None:
        """Stop the threads."""
        self._readers.shutdown(cancel_futures=True)
        self._preparer.shutdown(cancel_futures=True)

    def _finish_read(self, digest: str, future: Future[tuple[AdapterWeights, float]]) -> FinishedLoad:
        try:
            weights, seconds = future.result()
        except (ManifestError, ValueError) as error:
            return FinishedLoad(digest, "host", 0, str(error))
        except RuntimeError as error:  # torch, when no more memory can be pinned for a GPU
            return FinishedLoad(digest, "host", 0, f"it cannot be laid out in host memory: {error}")
        except (OSError, MemoryError) as error:
            return FinishedLoad(digest, "host", 0, f"its files cannot be read: {error.__class__.__name__}")
        if weights.digest != digest:
            reason = "its files have changed since they were checked; load it again under its name"
            return FinishedLoad(digest, "host", 0, reason)
        self._weights[digest] = weights
        return FinishedLoad(digest, "host", weights.num_bytes, None, seconds)

    def _finish_prepare(self, digest: str, future: Future[tuple[PreparedAdapter, float]]) -> FinishedLoad:
        try:
            prepared, seconds = future.result()
        except (ValueError, MemoryError, RuntimeError) as error:  # RuntimeError: torch, when the device's memory is out
            return FinishedLoad(digest, "device", 0, f"it cannot be brought to the device: {error}")
        self._prepared[digest] = prepared
        return FinishedLoad(digest, "device", self._weights[digest].num_bytes, None, seconds)


def _timed(work: Callable[[], _Loaded]) -> tuple[_Loaded, float]:
    began = time.perf_counter()
    return work(), time.perf_counter() - began
