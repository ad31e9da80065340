import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest.mock import ANY

import pytest

from loraplex_models.adapters.manifest import ManifestError
from loraplex_models.adapters.row_sums import UnfinishedWeights
from loraplex_server.engine.adapters.host_cache import FinishedLoad, HostCache


@pytest.fixture
def dropped() -> list[Any]:
    """What a cache has given back."""
    return []


class Adapter:
    """Weights on the device, or on their way there."""

    def __init__(self, digest: str) -> None:
        self.digest = digest
        self.is_there = digest != "slow"

    def has_arrived(self) -> bool:
        return self.is_there


@pytest.fixture
def cache_of(dropped: list[Any]) -> Iterator[Callable[[Callable[[str], Any]], HostCache]]:
    caches: list[HostCache] = []

    def make(read: Callable[[str], Any]) -> HostCache:
        caches.append(HostCache(read, arrange, prepare, dropped.append))
        return caches[-1]

    yield make
    for cache in caches:
        cache.close()


def arrange(weights: Any) -> Any:
    weights.is_arranged = True
    return weights


def prepare(weights: Any) -> Any:
    if weights.digest == "misfit":
        raise ValueError("'x' is [1, 2]")
    return Adapter(weights.digest)


def weights(digest: str) -> Any:
    return SimpleNamespace(digest=digest, num_bytes=5, device_bytes=6)


def finished(cache: HostCache, count: int = 1) -> list[FinishedLoad]:
    loads: list[FinishedLoad] = []
    while len(loads) < count:
        loads += cache.finished()
        time.sleep(0.001)
    return loads


def failing(error: Exception) -> Callable[[str], Any]:
    def read(path: str) -> Any:
        raise error

    return read


def test_weights_are_there_once_they_were_reported(cache_of: Callable[..., HostCache], dropped: list[Any]) -> None:
    cache = cache_of(lambda path: weights(path.upper()))
    cache.load("A", "a")
    assert finished(cache) == [FinishedLoad("A", "host", 5, None, ANY, 6)]
    assert cache.get("A").digest == "A"
    assert cache.finished() == []
    held = cache.get("A")
    cache.evict("A")
    assert dropped == [held]
    with pytest.raises(KeyError):
        cache.get("A")


def test_weights_that_wait_for_other_ranks_are_arranged_when_these_have_given_theirs(
    cache_of: Callable[..., HostCache], dropped: list[Any]
) -> None:
    cache = cache_of(lambda path: UnfinishedWeights(weights(path), {}))
    cache.load("A", "A")
    (load,) = finished(cache)
    assert load.error is None and load.unfinished is not None and load.num_bytes == 0
    with pytest.raises(KeyError):
        cache.get("A")
    ready = load.unfinished.weights
    assert not hasattr(ready, "is_arranged")
    cache.go_on(ready, 60.0)
    (load,) = finished(cache)
    assert (load.num_bytes, load.unfinished, load.error) == (5, None, None) and load.seconds > 60
    assert cache.get("A") is ready and ready.is_arranged
    cache.load("B", "C")
    (load,) = finished(cache)
    assert load.unfinished is None and "have changed" in str(load.error) and not dropped


def test_asking_never_waits_for_a_slow_reader_and_a_fast_one_passes_it(cache_of: Callable[..., HostCache]) -> None:
    may_go_on = threading.Event()

    def read(path: str) -> Any:
        assert path != "slow" or may_go_on.wait(30)
        return weights(path)

    cache = cache_of(read)
    cache.load("slow", "slow")
    cache.load("fast", "fast")
    assert [load.digest for load in finished(cache)] == ["fast"]
    assert cache.finished() == []
    may_go_on.set()
    assert [load.digest for load in finished(cache)] == ["slow"]


@pytest.mark.parametrize(
    ("read", "reason"),
    [
        (failing(ManifestError("tensor 'x' is missing")), "tensor 'x' is missing"),
        (failing(FileNotFoundError("/home/somebody/adapter")), "cannot be read: FileNotFoundError"),
        (failing(MemoryError()), "cannot be read: MemoryError"),
        (lambda _: weights("another"), "have changed"),
    ],
)
def test_a_failed_read_has_its_reason_and_leaves_nothing(
    cache_of: Callable[..., HostCache], read: Callable[[str], Any], reason: str, dropped: list[Any]
) -> None:
    cache = cache_of(read)
    cache.load("d", "p")
    (load,) = finished(cache)
    assert (load.digest, load.num_bytes) == ("d", 0)
    assert load.error is not None and reason in load.error and "somebody" not in load.error
    assert [made.digest for made in dropped] == (["another"] if "changed" in reason else [])
    with pytest.raises(KeyError):
        cache.get("d")


def test_what_was_prepared_is_handed_over_once_and_the_weights_stay(cache_of: Callable[..., HostCache]) -> None:
    cache = cache_of(weights)
    cache.load("A", "A")
    finished(cache)
    cache.prepare("A")
    assert finished(cache) == [FinishedLoad("A", "device", 5, None, ANY)]
    assert cache.take_prepared("A").digest == "A"
    assert cache.get("A").digest == "A"
    with pytest.raises(KeyError):
        cache.take_prepared("A")


def test_weights_that_do_not_fit_the_model_fail_with_the_reason(cache_of: Callable[..., HostCache]) -> None:
    cache = cache_of(weights)
    cache.load("misfit", "misfit")
    finished(cache)
    cache.prepare("misfit")
    (load,) = finished(cache)
    assert load.tier == "device" and "'x' is [1, 2]" in (load.error or "")


def test_an_adapter_is_on_the_device_when_its_copies_are_done_and_is_given_back_where_it_is_not_wanted(
    cache_of: Callable[..., HostCache], dropped: list[Any]
) -> None:
    cache = cache_of(weights)
    for digest in ("slow", "A"):
        cache.load(digest, digest)
    finished(cache, 2)
    for digest in ("slow", "A"):
        cache.prepare(digest)
    # One thread prepares in order: "slow" has been prepared too, and is still on its way.
    assert [load.digest for load in finished(cache)] == ["A"]
    assert cache.finished() == []
    cache._arriving["slow"].made.is_there = True
    assert [load.digest for load in finished(cache)] == ["slow"]
    cache.forget("slow", "device")
    assert [adapter.digest for adapter in dropped] == ["slow"]
