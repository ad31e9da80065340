"""The tensor-parallel group: the ranks that share one model. Only this file may know torch.distributed."""

import socket
from datetime import timedelta
from typing import Any

import torch
import torch.distributed
from torch import Tensor

# Its type information leaves out most of what follows. Groups are objects of our own, not torch's global one, so that
# several ranks can also be threads of one process.
_dist: Any = torch.distributed

LOOPBACK = "127.0.0.1"
# An idle rank waits for its next plan as long as it takes; whoever watches the processes ends those that hang.
WAIT_LIMIT = timedelta(days=365)
# How long ranks wait for each other when they start: the slowest may have to read its weights from a cold disk.
MEETING_LIMIT = timedelta(minutes=30)
# A message up to this size goes out in one collective; a step of many decodes is some hundred bytes a sequence.
FIRST_BYTES = 8192
LENGTH_BYTES = 8


class RanksLost(RuntimeError):
    """Another rank of the group has gone; nothing more can be computed together."""


class ParallelGroup:
    """The ranks that each hold a part of every layer; with one rank, collectives return their input.

    Every rank calls the same collectives in the same order. They raise RanksLost when a rank has gone.
    """

    def __init__(self, rank: int, size: int, links: "_Links | None" = None) -> None:
        assert 0 <= rank < size and (links is not None or size == 1), f"rank {rank} of {size}"
        self.rank = rank
        self.size = size
        self._links = links

    @classmethod
    def single(cls) -> "ParallelGroup":
        """Return the group of one rank."""
        return cls(0, 1)

    @classmethod
    def join(cls, rank: int, size: int, rendezvous: str, device: torch.device) -> "ParallelGroup":
        """Meet the other ranks, and return when all are there.

        `rendezvous` is `file://PATH` for ranks of one machine (a path that does not exist yet), or `tcp://HOST:PORT`,
        where rank 0 listens. Tensors on a GPU go over NCCL, those on a CPU over gloo. Raises RanksLost.
        """
        if size == 1:
            return cls.single()
        try:
            return cls(rank, size, _Links(rank, size, rendezvous, device))
        except RuntimeError as error:
            raise RanksLost(f"the {size} ranks did not meet at {rendezvous}: {_first_line(error)}") from None

    @property
    def can_be_captured(self) -> bool:
        """Whether a CUDA graph can hold the collectives: NCCL's run on the device, gloo's need the host."""
        return self._links is None or self._links.can_be_captured

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Return the sum of the ranks' tensors, which takes the place of `tensor`."""
        if self._links is not None:
            self._links.all_reduce(tensor)
        return tensor

    def all_gather(self, tensor: Tensor) -> Tensor:
        """Return the ranks' tensors, which are of one shape, side by side along the last dimension."""
        return tensor if self._links is None else torch.cat(self._links.all_gather(tensor), dim=-1)

    def broadcast(self, tensor: Tensor) -> None:
        """Put rank 0's tensor in place of the others', which are of its shape."""
        if self._links is not None:
            self._links.broadcast(tensor)

    def gather_numbers(self, numbers: list[int]) -> list[list[int]]:
        """Return the numbers of each rank, as many of each, in the order of ranks."""
        if self._links is None:
            return [numbers]
        return [found.tolist() for found in self._links.all_gather(torch.tensor(numbers, dtype=torch.int64))]

    def send(self, message: bytes) -> None:
        """Rank 0: give a message to every other rank, each of which calls `receive`."""
        assert self.rank == 0
        if self._links is not None:
            self._links.send(message)

    def receive(self) -> bytes:
        """The other ranks: wait for rank 0's next message."""
        assert self._links is not None and self.rank > 0
        return self._links.receive()


class _Links:
    """The connections to the other ranks."""

    def __init__(self, rank: int, size: int, rendezvous: str, device: torch.device) -> None:
        self._size = size
        store = _store(rank, size, rendezvous)
        options = _dist.ProcessGroupGloo._Options()
        options._timeout = WAIT_LIMIT
        # Without a name gloo asks for the machine's own, which in containers often leads nowhere.
        is_local = rendezvous.startswith("file:")
        host = LOOPBACK if is_local else _own_address(rendezvous)
        options._devices = [_dist.ProcessGroupGloo.create_device(hostname=host)]
        self._gloo = _dist.ProcessGroupGloo(_dist.PrefixStore("gloo", store), rank, size, options)
        self._tensors = self._gloo
        if device.type == "cuda":
            torch.cuda.set_device(device)
            options = _dist.ProcessGroupNCCL.Options()
            options._timeout = WAIT_LIMIT
            self._tensors = _dist.ProcessGroupNCCL(_dist.PrefixStore("nccl", store), rank, size, options)
        self.can_be_captured = self._tensors is not self._gloo
        self._store = store  # rank 0 may hold the listening end of it

    def all_reduce(self, tensor: Tensor) -> None:
        try:
            self._tensors.allreduce([tensor]).wait()
        except RuntimeError as error:
            raise RanksLost(_first_line(error)) from None

    def all_gather(self, tensor: Tensor) -> list[Tensor]:
        found = [torch.empty_like(tensor) for _ in range(self._size)]
        group = self._gloo if tensor.is_cpu else self._tensors
        try:
            group.allgather([found], [tensor]).wait()
        except RuntimeError as error:
            raise RanksLost(_first_line(error)) from None
        return found

    def broadcast(self, tensor: Tensor) -> None:
        try:
            self._tensors.broadcast(tensor, 0).wait()
        except RuntimeError as error:
            raise RanksLost(_first_line(error)) from None

    def send(self, message: bytes) -> None:
        data = len(message).to_bytes(LENGTH_BYTES, "little") + message
        for start, stop in ((0, FIRST_BYTES), (FIRST_BYTES, len(data))):
            if start < stop:
                part = bytearray(data[start:stop].ljust(FIRST_BYTES if start == 0 else 0, b"\0"))
                self._broadcast(torch.frombuffer(part, dtype=torch.uint8))

    def receive(self) -> bytes:
        first = torch.empty(FIRST_BYTES, dtype=torch.uint8)
        self._broadcast(first)
        data = first.numpy().tobytes()
        length = LENGTH_BYTES + int.from_bytes(data[:LENGTH_BYTES], "little")
        if length > FIRST_BYTES:
            rest = torch.empty(length - FIRST_BYTES, dtype=torch.uint8)
            self._broadcast(rest)
            data += rest.numpy().tobytes()
        return data[LENGTH_BYTES:length]

    def _broadcast(self, octets: Tensor) -> None:
        try:
            self._gloo.broadcast(octets, 0).wait()
        except RuntimeError as error:
            raise RanksLost(_first_line(error)) from None


def _store(rank: int, size: int, rendezvous: str) -> Any:
    kind, _, place = rendezvous.partition("://")
    if kind == "file":
        store = _dist.FileStore(place, size)
    else:
        host, _, port = place.rpartition(":")
        store = _dist.TCPStore(host.strip("[]"), int(port), size, rank == 0, MEETING_LIMIT)
    store.set_timeout(MEETING_LIMIT)
    return store


def _own_address(rendezvous: str) -> str:
    """The address of this machine by which the others, who all can reach the rendezvous, can reach it."""

    host, _, port = rendezvous.partition("://")[2].rpartition(":")
    family, _, _, _, address = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(address)  # sends nothing; the system chooses the interface
        return str(probe.getsockname()[0])


def _first_line(error: RuntimeError) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
