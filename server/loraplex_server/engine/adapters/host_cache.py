"""The host tier of one rank: threads read checked files; finished weights wait here for a slot."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from loraplex_models.adapters.manifest import ManifestError
from loraplex_models.adapters.weights import AdapterWeights

# Two readers hide each other's disk waits; more would take cores from the model.
NUM_READERS = 2


@dataclass(frozen=True, slots=True)
class HostLoad:
    """A finished read: its size, or why it failed."""

    digest: str
    num_bytes: int
    error: str | None


class HostCache:
    """Weights in host memory by digest. `read` turns a folder into weights and must give the digest asked for."""

    def __init__(self, read: Callable[[str], AdapterWeights]):
        self._read = read
        self._weights: dict[str, AdapterWeights] = {}
        self._pending: dict[str, Future[AdapterWeights]] = {}
        self._readers = ThreadPoolExecutor(NUM_READERS, thread_name_prefix="adapter-reader")

    def load(self, digest: str, path: str) -> None:
        """Start reading in the background."""
        self._pending[digest] = self._readers.submit(self._read, path)

    def evict(self, digest: str) -> None:
        """Give the memory back."""
        self._weights.pop(digest, None)

    def get(self, digest: str) -> AdapterWeights:
        """Weights that were reported as loaded."""
        return self._weights[digest]

    def finished(self) -> list[HostLoad]:
        """Reads that ended since the last call; never waits."""
        if not self._pending:
            return []
        done = [digest for digest, future in self._pending.items() if future.done()]
        return [self._finish(digest, self._pending.pop(digest)) for digest in done]

    def close(self) -> None:
        """Stop the readers."""
        self._readers.shutdown(cancel_futures=True)

    def _finish(self, digest: str, future: Future[AdapterWeights]) -> HostLoad:
        try:
            weights = future.result()
        except ManifestError as error:
            return HostLoad(digest, 0, str(error))
        except (OSError, MemoryError) as error:
            return HostLoad(digest, 0, f"its files cannot be read: {error.__class__.__name__}")
        if weights.digest != digest:
            return HostLoad(digest, 0, "its files have changed since they were checked; load it again under its name")
        self._weights[digest] = weights
        return HostLoad(digest, weights.num_bytes, None)
