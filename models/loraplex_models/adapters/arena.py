"""Arenas: one memory each, of the host or of a device, that adapters' frames are carved from."""

import threading
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from loraplex_kernels.copies import Fence
from loraplex_models.adapters.frames import FreeFrames, Layout, Place


@dataclass(eq=False, slots=True)
class Block:
    """One adapter's frames in a memory. Whoever reads it on a device says with which fence it is done."""

    memory: Tensor  # [bytes] uint8
    frame_bytes: int
    frames: tuple[int, ...]  # of the memory, by the layout's number
    last_read: Fence | None = None

    @property
    def nbytes(self) -> int:
        """What the frames take."""
        return len(self.frames) * self.frame_bytes

    def start(self, place: Place) -> int:
        """Where a place is in the memory, in bytes."""
        frame, offset = place
        return self.frames[frame] * self.frame_bytes + offset

    def at(self, place: Place, num_bytes: int) -> Tensor:
        """The bytes of a piece."""
        start = self.start(place)
        return self.memory[start : start + num_bytes]


class Arena:
    """A memory whose frames blocks are made of; any thread may take and give."""

    def __init__(self, memory: Tensor, frame_bytes: int) -> None:
        """`memory`: [bytes] uint8, dense."""
        self._memory = memory
        self._frame_bytes = frame_bytes
        self._free = FreeFrames(len(memory) // frame_bytes)
        self._lock = threading.Lock()

    @property
    def num_free_bytes(self) -> int:
        """Bytes of the frames that nobody has."""
        with self._lock:
            return self._free.num_free * self._frame_bytes

    def take(self, layout: Layout) -> tuple[Block, list[Fence]] | None:
        """A block for a layout, to be written after the fences; None where there is none. See `FreeFrames.take`."""
        with self._lock:
            found = self._free.take(layout)
        return None if found is None else (Block(self._memory, self._frame_bytes, found[0]), found[1])

    def owns(self, block: Block) -> bool:
        """Whether the block is of this memory."""
        return block.memory is self._memory

    def give(self, block: Block, fence: Fence | None = None) -> None:
        """Give a block back, which is in use until the fence has passed."""
        assert self.owns(block), "a block of another memory"
        with self._lock:
            self._free.give(block.frames, fence)


def pairs_of(to: Block, source: Block) -> list[tuple[Tensor, Tensor]]:
    """The copies that bring one block into another of the same layout: frames that are neighbours in both are one."""
    size = to.frame_bytes
    pairs: list[tuple[Tensor, Tensor]] = []
    first = 0
    for number in range(1, len(to.frames) + 1):
        if number < len(to.frames) and all(
            block.frames[number] == block.frames[number - 1] + 1 for block in (to, source)
        ):
            continue
        num_bytes = (number - first) * size
        pairs.append((to.at((first, 0), num_bytes), source.at((first, 0), num_bytes)))
        first = number
    return pairs


def own_block(layout: Layout, frame_bytes: int) -> Block:
    """A block in ordinary host memory of its own."""
    memory = torch.empty(layout.num_frames * frame_bytes, dtype=torch.uint8)
    return Block(memory, frame_bytes, tuple(range(layout.num_frames)))


def wait_for(fences: Sequence[Fence]) -> None:
    """Wait until all have passed; for threads that no step waits for."""
    for fence in fences:
        fence.synchronize()
