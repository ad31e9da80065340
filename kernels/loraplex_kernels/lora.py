"""The LoRA delta of a batch whose tokens have different adapters, in two calls: shrink and expand."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from loraplex_kernels.cpu import lora as _cpu
from loraplex_kernels.cpu.compiled import is_compiled


class LoraTable:
    """All slots' weights for one linear layer, each adapter with its own ranks; empty slots take no room.

    The layer may fuse several modules (q, k and v), its parts: each reads the whole input through its own A and writes
    its own columns of the output through its own B.
    """

    def __init__(self, num_slots: int, part_sizes: Sequence[int], dtype: torch.dtype, device: torch.device):
        self.part_sizes = tuple(part_sizes)
        self.num_slots = num_slots
        self.num_parts = len(self.part_sizes)
        self.is_compiled = device.type == "cpu" and is_compiled(dtype)
        self.is_half = dtype is torch.bfloat16
        self.max_rank = 0
        self.slots: set[int] = set()
        # The weights by slot and part, B transposed so that a rank's row is dense.
        self.weights: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        # For compiled loops: by slot and part the address of A, that of B, and the rank (0: none); the parts' borders.
        self._cells: NDArray[np.int64] = np.zeros((num_slots, self.num_parts, 3), np.int64)
        self._columns = torch.tensor([0, *part_sizes]).cumsum(0)
        self.address = self._cells.ctypes.data
        self.columns_address = self._columns.data_ptr()

    def set(self, slot: int, part: int, a: Tensor, b: Tensor) -> None:
        """Put one module's weights in: a [rank, in], b [part's size, rank], both of the table's dtype and device."""
        a, b = a.contiguous(), b.t().contiguous()
        self.weights[slot, part] = (a, b)
        self._cells[slot, part] = (a.data_ptr(), b.data_ptr(), len(a))
        self.slots.add(slot)
        self.max_rank = max(self.max_rank, len(a))

    def clear(self, slot: int) -> None:
        """Take an adapter's weights out."""
        if slot not in self.slots:
            return
        self.slots.remove(slot)
        self._cells[slot] = 0
        for part in range(self.num_parts):
            self.weights.pop((slot, part), None)
        self.max_rank = int(self._cells[:, :, 2].max())


class LoraSegments:
    """Runs of neighbouring tokens of one adapter: N + 1 borders, ascending from 0 to T, and N slots, -1 for none."""

    def __init__(self, starts: Sequence[int], slots: Sequence[int]):
        segments = zip(starts, starts[1:], slots, strict=False)
        self.all = tuple((start, end, slot) for start, end, slot in segments if slot >= 0 and start < end)
        self.long = tuple(segment for segment in self.all if segment[1] - segment[0] >= _cpu.MIN_LONG_SEGMENT)
        self.has_short = len(self.long) < len(self.all)
        self.count = len(slots)
        self._starts = torch.tensor(starts, dtype=torch.int32)
        self._slots = torch.tensor(slots, dtype=torch.int32)
        self.starts_address = self._starts.data_ptr()
        self.slots_address = self._slots.data_ptr()


class Deltas(NamedTuple):
    """What the adapters of a batch add to one linear layer."""

    table: LoraTable
    segments: LoraSegments


def add_deltas(x: Tensor, deltas: Deltas, out: Tensor) -> None:
    """Add each token's delta in place: `lora_shrink`, then `lora_expand`. x: [T, in]; out: [T, out], both dense."""
    lora_expand(lora_shrink(x, *deltas), *deltas, out)


def lora_shrink(x: Tensor, table: LoraTable, segments: LoraSegments) -> Tensor:
    """Project each token onto the ranks of its adapter: h[t, p, :rank] = x[t] @ A[slot of t, p].T for every part p.

    x: [T, in], dense. Returns [T, parts * max_rank] float32; cells beyond an adapter's own ranks, and rows without an
    adapter, hold no meaning and are read by nobody.
    """
    num_tokens, size = x.shape
    max_rank = table.max_rank
    h = torch.empty(num_tokens, table.num_parts * max_rank, dtype=torch.float32, device=x.device)
    remaining = segments.all
    if table.is_compiled:
        remaining = segments.long
        if segments.has_short:
            _cpu.shrink_short(
                table.is_half, x.data_ptr(), num_tokens, size, table.address, table.num_slots, table.num_parts,
                segments.starts_address, segments.slots_address, segments.count, max_rank, h.data_ptr(),
            )  # fmt: skip
    for start, end, slot in remaining:
        for part in range(table.num_parts):
            if (weights := table.weights.get((slot, part))) is not None:
                first = part * max_rank
                h[start:end, first : first + len(weights[0])] = x[start:end] @ weights[0].t()
    return h


def lora_expand(h: Tensor, table: LoraTable, segments: LoraSegments, out: Tensor) -> None:
    """Add each token's delta in place: out[t, columns of p] += h[t, p, :rank] @ B[slot of t, p].T for every part p.

    h: from `lora_shrink`; out: [T, sum of the parts' sizes], dense.
    """
    num_tokens, size = out.shape
    max_rank = table.max_rank
    remaining = segments.all
    if table.is_compiled:
        remaining = segments.long
        if segments.has_short:
            _cpu.expand_short(
                table.is_half, h.data_ptr(), num_tokens, size, table.address, table.num_slots, table.num_parts,
                segments.starts_address, segments.slots_address, segments.count, max_rank,
                table.columns_address, out.data_ptr(),
            )  # fmt: skip
    for start, end, slot in remaining:
        column = 0
        for part, part_size in enumerate(table.part_sizes):
            if (weights := table.weights.get((slot, part))) is not None:
                first = part * max_rank
                ranks = h[start:end, first : first + len(weights[1])].to(out.dtype)
                out[start:end, column : column + part_size] += ranks @ weights[1]
            column += part_size
