"""Copies from host memory to a device that run beside its computation, and fences that say how far either has come."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from loraplex_kernels.streams import new_stream


class Fence(Protocol):
    """A point in a device's work. `torch.cuda.Event` is one."""

    def query(self) -> bool:
        """Whether the work before it is done; never waits."""
        ...

    def synchronize(self) -> None:
        """Wait until it is; for threads that no step waits for."""
        ...


class Passed:
    """The fence of work that was done when it was asked for."""

    def query(self) -> bool:
        """Yes."""
        return True

    def synchronize(self) -> None:
        """Nothing to wait for."""


class Copies(Protocol):
    """One device's line of copies. What is copied must stay as it is until the copy's fence has passed."""

    def send(self, pairs: Sequence[tuple[Tensor, Tensor]], after: Sequence[Fence] = ()) -> Fence:
        """Start to copy the second of each pair over the first, once the fences `after` have passed.

        The host waits for nothing, and may go on from any thread.
        """
        ...

    def mark(self) -> Fence:
        """The fence behind all that the calling thread's computation has launched so far."""
        ...

    def join(self, fence: Fence) -> None:
        """Let what the calling thread launches from now on come after a fence; the host does not wait."""
        ...


class PlainCopies:
    """Copies where there is no GPU: done at once. See `Copies`."""

    def send(self, pairs: Sequence[tuple[Tensor, Tensor]], after: Sequence[Fence] = ()) -> Fence:
        """Copy."""
        with torch.inference_mode():
            for to, source in pairs:
                to.copy_(source)
        return Passed()

    def mark(self) -> Fence:
        """All is done."""
        return Passed()

    def join(self, fence: Fence) -> None:
        """All is done."""


class CudaCopies:
    """Copies on a stream of their own. See `Copies`.

    Both sides of every pair must be kept by their owner, who reuses them after fences only: torch's allocator is told
    nothing of this stream.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = new_stream(device)

    def send(self, pairs: Sequence[tuple[Tensor, Tensor]], after: Sequence[Fence] = ()) -> Fence:
        """Launch the copies. From pinned memory they run beside everything else; from other memory the caller waits."""
        for fence in after:
            assert isinstance(fence, torch.cuda.Event), "a fence of other copies"
            self._stream.wait_event(fence)
        # Any thread may come here, and what a thread in inference mode has allocated only others in it may write.
        with torch.inference_mode(), torch.cuda.stream(self._stream):
            for to, source in pairs:
                to.copy_(source, non_blocking=True)
        return self._record(self._stream)

    def mark(self) -> Fence:
        """The fence behind what was launched on the current stream."""
        return self._record(torch.cuda.current_stream(self._device))

    def join(self, fence: Fence) -> None:
        """Let the current stream wait."""
        assert isinstance(fence, torch.cuda.Event), "a fence of other copies"
        torch.cuda.current_stream(self._device).wait_event(fence)

    def _record(self, stream: torch.cuda.Stream) -> Fence:
        # A new one each time: an event that is recorded again forgets the point that others still wait for.
        # Those who wait for it sleep meanwhile, where they would turn in circles on a core.
        event: torch.cuda.Event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        event.record(stream)
        return event


def make_copies(device: torch.device) -> Copies:
    """The line of copies to a device."""
    return CudaCopies(device) if device.type == "cuda" else PlainCopies()
