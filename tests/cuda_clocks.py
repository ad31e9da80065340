"""Who may touch which bytes when: streams, events and the host as participants that have seen work, or have not.

Work runs at once, in the order of its launch, so the numbers of a step without mistakes are right. What a GPU would run
at the same time is found by clocks: each launch on a stream has a number; waiting for an event, or for a stream, is to
have seen its launches up to a number. Bytes that one stream writes and another touches must have been seen by it.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor


class Race(AssertionError):
    """Two streams, or a stream and the host, touch the same bytes with nothing that orders them."""


class NotInCapture(RuntimeError):
    """Something that CUDA refuses while a graph is captured."""


class HostWaits(RuntimeError):
    """The host waits for the device where it must not."""


Clock = dict["Participant", int]


class Participant:
    """A stream, or the host: how many launches it has made, and which of the others' it has seen."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.count = 0
        self.seen: Clock = {}

    def now(self) -> Clock:
        """Everything that is done when this participant's last launch is."""
        return self.seen | {self: self.count}

    def see(self, clock: Clock) -> None:
        """Wait for what the clock says."""
        for other, count in clock.items():
            if other is not self:
                self.seen[other] = max(self.seen.get(other, 0), count)

    def has_seen(self, other: Participant, count: int) -> bool:
        """Whether that launch is done for sure when this participant goes on."""
        return other is self or self.seen.get(other, 0) >= count


@dataclass(slots=True)
class _Access:
    start: int
    stop: int
    stream: Participant
    count: int
    writes: bool
    what: str


@dataclass(slots=True, eq=False)
class _Copy:
    """A copy between pinned memory and the device that may still be under way."""

    stream: Participant
    count: int
    finish: Callable[[], None]


@dataclass(slots=True)
class Machine:
    """One GPU and its host."""

    default: Participant = field(default_factory=lambda: Participant("default stream"))
    host: Participant = field(default_factory=lambda: Participant("host"))
    accesses: dict[int, list[_Access]] = field(default_factory=dict)  # by the address of a storage
    copies: list[_Copy] = field(default_factory=list)
    lock: threading.RLock = field(default_factory=threading.RLock)
    sync_is_error: bool = False
    allocated_bytes: int = 0
    names: itertools.count[int] = field(default_factory=lambda: itertools.count(1))

    def allocated(self, tensor: Tensor) -> None:
        """The storage is new: what was known of its address belongs to another."""
        self.accesses[tensor.untyped_storage().data_ptr()] = []
        self.allocated_bytes += tensor.untyped_storage().nbytes()

    def launch(self, stream: Participant, what: str, reads: Iterable[Tensor], writes: Iterable[Tensor]) -> None:
        """Count one launch; raises Race where it touches what it cannot be sure of."""
        stream.see(self.host.now())
        stream.count += 1
        for is_write, tensors in ((False, reads), (True, writes)):
            for tensor in tensors:
                self._touch(stream, what, tensor, is_write)

    def _touch(self, stream: Participant, what: str, tensor: Tensor, is_write: bool) -> None:
        storage = tensor.untyped_storage()
        start = storage.data_ptr() + tensor.storage_offset() * tensor.itemsize
        extent = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1
        stop = start + (extent * tensor.itemsize if tensor.numel() else 0)
        known = self.accesses.setdefault(storage.data_ptr(), [])
        for one in known:
            is_conflict = one.start < stop and start < one.stop and (one.writes or is_write)
            if is_conflict and not stream.has_seen(one.stream, one.count):
                did, does = ("writes" if one.writes else "reads"), ("writes" if is_write else "reads")
                raise Race(
                    f"{what} on {stream.name} {does} what {one.what} on {one.stream.name} {did}, without waiting"
                )
        # What lies within a range that is written now, or was read from the same stream before, says nothing more.
        known[:] = [
            one
            for one in known
            if not (start <= one.start and one.stop <= stop and (is_write or (one.stream is stream and not one.writes)))
        ]
        known.append(_Access(start, stop, stream, stream.count, is_write, what))

    def host_waits(self, clock: Clock) -> None:
        """The host has waited: copies that are done by then are checked and come in."""
        self.host.see(clock)
        done = [copy for copy in self.copies if self.host.has_seen(copy.stream, copy.count)]
        self.copies = [copy for copy in self.copies if copy not in done]
        for copy in done:
            copy.finish()

    def copy_under_way(self, stream: Participant, finish: Callable[[], None]) -> None:
        """Remember a copy; `finish` is called once the host is known to have waited for it."""
        self.copies.append(_Copy(stream, stream.count, finish))


def still_unchanged(host: Tensor) -> Callable[[], None]:
    """Remember what stands in pinned memory; calling what comes back raises Race when that was changed since."""
    before = host.clone()

    def check() -> None:
        if not torch.equal(host.view(-1).view(torch.uint8), before.view(-1).view(torch.uint8)):
            raise Race("pinned memory was written before the copy from it was done")

    return check


def arrives_late(host: Tensor, value: Tensor) -> Callable[[], None]:
    """Put nonsense into pinned memory that the device will write; calling what comes back writes the value."""
    value = value.clone()
    host.fill_(float("nan") if host.is_floating_point() else (0 if host.dtype is torch.bool else 77))

    def arrive() -> None:
        with torch.inference_mode():  # a device does not ask in which mode memory was taken
            host.copy_(value)

    return arrive
