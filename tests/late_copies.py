"""A device that runs late and in any order that its streams allow, in place of a GPU's streams and events."""

import random
import threading
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from loraplex_kernels.copies import Fence


class LateFence:
    """Passes when the device comes to it."""

    def __init__(self, device: "LateCopies") -> None:
        self.has_passed = False
        self._device = device

    def query(self) -> bool:
        return self.has_passed

    def synchronize(self) -> None:
        self._device.run_until(lambda: self.has_passed)


class LateCopies:
    """Copies and computation that happen when the test says, not when they are launched. See `Copies`.

    What is launched on one stream runs in order; two streams run as the draw falls, unless a fence orders them. Memory
    is read and written at that time, so what is reused too early is seen as it is then.
    """

    def __init__(self, draw: random.Random) -> None:
        self._draw = draw
        self._streams: tuple[deque[Callable[[], bool]], deque[Callable[[], bool]]] = (deque(), deque())
        self._lock = threading.RLock()
        self.num_sent = 0

    def send(self, pairs: Sequence[tuple[Tensor, Tensor]], after: Sequence[Fence] = ()) -> Fence:
        with self._lock:
            self.num_sent += 1
            for fence in after:
                self._streams[1].append(fence.query)
            for to, source in pairs:
                self._streams[1].append(partial(_copy, to, source))
            return self._record(1)

    def mark(self) -> Fence:
        with self._lock:
            return self._record(0)

    def join(self, fence: Fence) -> None:
        with self._lock:
            self._streams[0].append(fence.query)

    def launch(self, work: Callable[[], None]) -> None:
        """Computation behind all that was launched before."""
        with self._lock:
            self._streams[0].append(lambda: work() is None)

    def run_some(self, count: int) -> None:
        """Let up to so many operations happen."""
        with self._lock:
            for _ in range(count):
                if not self._run_one():
                    return

    def run_until(self, is_enough: Callable[[], bool]) -> None:
        """Let operations happen until then."""
        with self._lock:
            while not is_enough():
                assert self._run_one(), "the device waits for what never comes"

    def run_all(self) -> None:
        """Let everything happen."""
        self.run_until(lambda: not any(self._streams))

    def _run_one(self) -> bool:
        for stream in self._draw.sample(self._streams, 2):
            if stream and stream[0]():  # an operation that waits for a fence says no, and is tried again
                stream.popleft()
                return True
        return False

    def _record(self, stream: int) -> LateFence:
        fence = LateFence(self)

        def passed() -> bool:
            fence.has_passed = True
            return True

        self._streams[stream].append(passed)
        return fence


def _copy(to: Tensor, source: Tensor) -> bool:
    with torch.inference_mode():
        to.copy_(source)
    return True
