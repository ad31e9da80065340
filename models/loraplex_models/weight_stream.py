"""A checkpoint's bytes on their way to a GPU: threads read files into pinned buffers, copies take them on from there.

The device computes meanwhile: what becomes of the bytes (another number type, a cut, several stacked) is done there.
Host memory is that of the buffers, whatever the checkpoint's size; the files themselves pass through the page cache.
"""

import os
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

import torch
from torch import Tensor

from loraplex_kernels.copies import Copies, Fence, make_copies
from loraplex_models.host_memory import host_memory

# A disk of several GB/s wants many reads in flight, and large ones.
NUM_READERS = 8
CHUNK_BYTES = 8 << 20
BUFFERS_A_READER = 2  # one is filled while a copy empties the other

Range = tuple[int, int]  # start and stop, in bytes of a file


@dataclass(eq=False, slots=True)
class _Buffer:
    memory: Tensor  # [chunk_bytes] uint8, pinned
    emptied: Fence | None = None  # the copy that reads it


@dataclass(frozen=True, slots=True)
class Arriving:
    """Bytes on their way."""

    memory: Tensor  # [bytes] uint8 on the device
    chunks: list[Future[Fence]]


class WeightStream:
    """Ranges of files as tensors on a device. Started and taken by one thread."""

    def __init__(
        self,
        device: torch.device,
        copies: Copies | None = None,
        *,
        num_readers: int = NUM_READERS,
        chunk_bytes: int = CHUNK_BYTES,
    ) -> None:
        self._device = device
        self._copies = make_copies(device) if copies is None else copies
        self._chunk_bytes = chunk_bytes
        self._buffers: SimpleQueue[_Buffer] = SimpleQueue()
        self._pinned = host_memory(num_readers * BUFFERS_A_READER * chunk_bytes, device)
        for start in range(0, len(self._pinned), chunk_bytes):
            self._buffers.put(_Buffer(self._pinned[start : start + chunk_bytes]))
        self._files: dict[Path, int] = {}
        self._readers = ThreadPoolExecutor(num_readers, thread_name_prefix="weight-reader")

    def start(self, path: Path, ranges: Sequence[Range]) -> Arriving:
        """Begin to read some ranges of a file, to lie one after the other. Raises OSError."""
        if path not in self._files:
            self._files[path] = os.open(path, os.O_RDONLY)
        file = self._files[path]
        memory = torch.empty(sum(stop - start for start, stop in ranges), dtype=torch.uint8, device=self._device)
        # The allocator may have had it for work that the device has not come to.
        is_free = self._copies.mark()
        chunks: list[Future[Fence]] = []
        end = 0
        for start, stop in ranges:
            for first in range(start, stop, self._chunk_bytes):
                count = min(self._chunk_bytes, stop - first)
                chunks.append(self._readers.submit(self._bring, file, first, memory[end : end + count], is_free))
                end += count
        return Arriving(memory, chunks)

    def take(self, arriving: Arriving) -> Tensor:
        """The bytes, [bytes] uint8, for what is launched from now on. Raises OSError, and EOFError for a short file."""
        try:
            fences = [chunk.result() for chunk in arriving.chunks]
        except BaseException:
            self.drop(arriving)
            raise
        for fence in fences:
            self._copies.join(fence)
        return arriving.memory

    def drop(self, arriving: Arriving) -> None:
        """Give up on some bytes: their memory is free when this returns."""
        for chunk in arriving.chunks:
            chunk.cancel()
        for chunk in arriving.chunks:
            if not chunk.cancelled() and chunk.exception() is None:
                chunk.result().synchronize()

    def close(self) -> None:
        """Stop the readers and close the files; what was started must have been taken or dropped."""
        self._readers.shutdown()
        while not self._buffers.empty():
            emptied = self._buffers.get().emptied
            if emptied is not None:
                emptied.synchronize()
        for file in self._files.values():
            os.close(file)
        self._files.clear()

    def _bring(self, file: int, start: int, to: Tensor, is_free: Fence) -> Fence:
        buffer = self._buffers.get()
        try:
            if buffer.emptied is not None:
                buffer.emptied.synchronize()
            chunk = buffer.memory[: len(to)]
            _read_all(file, start, chunk.numpy().data)
            buffer.emptied = self._copies.send([(to, chunk)], [is_free])
            return buffer.emptied
        finally:
            self._buffers.put(buffer)


def _read_all(file: int, start: int, into: memoryview) -> None:
    done = 0
    while done < len(into):
        count = os.preadv(file, [into[done:]], start + done)
        if count == 0:
            raise EOFError(f"it ends at byte {start + done}")
        done += count
