"""Adapters on a GPU in rank pages, and the LoRA delta of a batch whose rows have different adapters.

The layout. Linears of the same shape, one a layer, are a class (qkv, o, gate_up, down of a plain decoder): they read
`in_size` inputs and fuse `part_sizes` outputs (q, k and v). A page holds PAGE_RANKS ranks of one adapter for all layers
of a class, layer after layer, and within a layer A [parts, PAGE_RANKS, in_size], then B transposed
[PAGE_RANKS, sum of part_sizes]: the rank is the outer dimension of both, so every row is dense whatever the rank, and
an adapter takes the bytes of its own ranks, rounded up to pages; a page is one copy from the host. Rank r of an adapter
is row r % PAGE_RANKS of its page r // PAGE_RANKS, in every part and layer; a module of lower rank, or none, leaves its
rows unread. Scaling is part of B. `page_table[slot]` names the slot's pages, `ranks[layer, slot, part]` what is valid:
a cell beyond it may hold anything, so neither putting in nor taking out an adapter writes zeros.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from loraplex_kernels.dispatch import on_gpu
from loraplex_kernels.reference import lora_pages as _reference

PAGE_RANKS = 8
# Rows of a tile: the least that tensor cores multiply, for decoding; more for prompts, which have long runs of rows.
DECODE_TILE_ROWS = 16
PREFILL_TILE_ROWS = 64
# Columns of one program of expand, for decoding and for prompts; a block of columns lies within one part.
COLUMN_BLOCKS = (256, 128)

# A [rank, in_size] and B [part size, rank] by layer and part.
ClassWeights = Mapping[tuple[int, int], tuple[Tensor, Tensor]]


class NoRankPages(RuntimeError):
    """An adapter needs more pages than are free; whoever plans loads counts pages, so this is a fault of ours."""


@dataclass(frozen=True, slots=True)
class LayerPages:
    """One linear's part of the pages: what the kernels read. Addresses stay the same while the server lives."""

    a: Tensor  # [pages, parts, PAGE_RANKS, in_size], a view with the pages' stride
    b: Tensor  # [pages, PAGE_RANKS, sum of part_sizes], likewise
    page_table: Tensor  # [slots, most pages of a slot] int32
    ranks: Tensor  # [slots, parts] int32, 0: the adapter does not touch the part
    columns: Tensor  # [parts + 1] int32: where each part's columns start in the output, and their end
    blocks: Mapping[int, Tensor]  # by width: [blocks, 3] int32, a block's part, its first column, its part's end
    part_sizes: tuple[int, ...]
    max_rank: int


class RankPages:
    """The pages of one class over all layers."""

    def __init__(
        self, *, num_layers: int, in_size: int, part_sizes: Sequence[int], num_slots: int, max_rank: int,
        num_pages: int, dtype: torch.dtype, device: torch.device,
    ) -> None:  # fmt: skip
        """Reserve all memory there will ever be; a slot may take adapters up to `max_rank`."""
        self.part_sizes = tuple(part_sizes)
        self.num_layers = num_layers
        self.num_pages = num_pages
        self._a_size = len(part_sizes) * PAGE_RANKS * in_size
        self._b_size = PAGE_RANKS * sum(part_sizes)
        page_size = num_layers * (self._a_size + self._b_size)
        self.page_bytes = page_size * dtype.itemsize
        self._cells = torch.empty(num_pages, page_size, dtype=dtype, device=device)
        most_pages = pages_for(max_rank)
        self._page_table = torch.zeros(num_slots, most_pages, dtype=torch.int32, device=device)
        self._ranks = torch.zeros(num_layers, num_slots, len(part_sizes), dtype=torch.int32, device=device)
        self._columns = torch.tensor([0, *part_sizes], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(device)
        self._blocks = {width: _column_blocks(self.part_sizes, width).to(device) for width in COLUMN_BLOCKS}
        self._free = list(range(num_pages - 1, -1, -1))
        self._held: dict[int, list[int]] = {}
        self._in_size = in_size
        self._max_rank = most_pages * PAGE_RANKS

    @property
    def num_free(self) -> int:
        """Pages that no slot holds."""
        return len(self._free)

    def holds(self, slot: int) -> bool:
        """Whether the slot's adapter touches this class."""
        return slot in self._held

    def layer(self, index: int) -> LayerPages:
        """Return one layer's view, good for as long as the pages live."""
        start = index * (self._a_size + self._b_size)
        a = self._a_of(self._cells[:, start : start + self._a_size])
        b_start = start + self._a_size
        b = self._b_of(self._cells[:, b_start : b_start + self._b_size])
        return LayerPages(
            a, b, self._page_table, self._ranks[index], self._columns, self._blocks, self.part_sizes, self._max_rank
        )

    def put(self, slot: int, weights: ClassWeights) -> None:
        """Copy an adapter's weights of this class into pages for a slot that is empty. Raises NoRankPages."""
        assert slot not in self._held, f"slot {slot} is taken"
        rank = max((len(a) for a, _ in weights.values()), default=0)
        if rank == 0:
            return
        needed = pages_for(rank)
        if needed > len(self._free):
            raise NoRankPages(f"an adapter of rank {rank} needs {needed} rank pages; {len(self._free)} are free")
        pages = [self._free.pop() for _ in range(needed)]
        self._held[slot] = pages
        packed, ranks = self.pack(weights)
        for index, page in enumerate(pages):
            self._cells[page].copy_(packed[index], non_blocking=True)
        self._page_table[slot, :needed].copy_(torch.tensor(pages, dtype=torch.int32))
        self._ranks[:, slot].copy_(ranks)

    def take_out(self, slot: int) -> None:
        """Give a slot's pages back; nothing happens where it has none."""
        pages = self._held.pop(slot, None)
        if pages is not None:
            self._free += reversed(pages)
            self._ranks[:, slot].zero_()

    def pack(self, weights: ClassWeights) -> tuple[Tensor, Tensor]:
        """Lay an adapter's weights out as pages: ([its pages, page size], ranks [layers, parts]), on the host."""
        rank = max((len(a) for a, _ in weights.values()), default=0)
        packed = torch.zeros(pages_for(rank), self._cells.shape[1], dtype=self._cells.dtype)
        ranks = torch.zeros(self.num_layers, len(self.part_sizes), dtype=torch.int32)
        layers = packed.view(len(packed), self.num_layers, self._a_size + self._b_size)
        starts = [sum(self.part_sizes[:part]) for part in range(len(self.part_sizes))]
        for (layer, part), (a, b) in weights.items():
            ranks[layer, part] = len(a)
            a_cells, b_cells = (
                self._a_of(layers[:, layer, : self._a_size]),
                self._b_of(layers[:, layer, self._a_size :]),
            )
            for first in range(0, len(a), PAGE_RANKS):
                count = min(PAGE_RANKS, len(a) - first)
                page = first // PAGE_RANKS
                a_cells[page, part, :count] = a[first : first + count]
                columns = slice(starts[part], starts[part] + self.part_sizes[part])
                b_cells[page, :count, columns] = b[:, first : first + count].T
        return packed, ranks

    def _a_of(self, cells: Tensor) -> Tensor:
        return cells.view(len(cells), len(self.part_sizes), PAGE_RANKS, self._in_size)

    def _b_of(self, cells: Tensor) -> Tensor:
        return cells.view(len(cells), PAGE_RANKS, sum(self.part_sizes))


def pages_for(rank: int) -> int:
    """Pages that an adapter of that rank takes in a class."""
    return -(-rank // PAGE_RANKS)


def _column_blocks(part_sizes: Sequence[int], width: int) -> Tensor:
    blocks: list[tuple[int, int, int]] = []
    end = 0
    for part, size in enumerate(part_sizes):
        start, end = end, end + size
        blocks += [(part, first, end) for first in range(start, end, width)]
    return torch.tensor(blocks, dtype=torch.int32)


@dataclass(frozen=True, slots=True)
class RowTiles:
    """A batch's rows that have adapters, cut into tiles of one adapter each; shared by all linears of a step.

    Kernels run as many tiles as `num_tiles`, read on the device, says: a captured graph serves any mix of adapters
    that fits the arrays. Tiles beyond it hold no meaning.
    """

    starts: Tensor  # [most tiles] int32: first row
    counts: Tensor  # [most tiles] int32: rows, 1 to tile_rows
    slots: Tensor  # [most tiles] int32
    num_tiles: Tensor  # [1] int32
    row_slots: Tensor  # [rows] int32, -1: no adapter
    tile_rows: int


def cut_tiles(
    segment_starts: Sequence[int], segment_slots: Sequence[int], tile_rows: int
) -> tuple[list[int], list[int], list[int]]:
    """Starts, counts and slots of the tiles of a batch's runs of rows: N + 1 borders and N slots, -1 for no adapter."""
    starts: list[int] = []
    counts: list[int] = []
    slots: list[int] = []
    for start, end, slot in zip(segment_starts, segment_starts[1:], segment_slots, strict=False):
        if slot < 0:
            continue
        for first in range(start, end, tile_rows):
            starts.append(first)
            counts.append(min(tile_rows, end - first))
            slots.append(slot)
    return starts, counts, slots


def make_tiles(
    segment_starts: Sequence[int], segment_slots: Sequence[int], tile_rows: int, device: torch.device
) -> RowTiles:
    """The tiles of one batch as tensors of their own, exactly as long as needed."""
    starts, counts, slots = cut_tiles(segment_starts, segment_slots, tile_rows)
    lengths = np.diff(np.asarray(segment_starts))
    packed = np.array([starts, counts, slots], np.int32)
    tiles = torch.from_numpy(packed).to(device)
    row_slots = torch.from_numpy(np.repeat(np.asarray(segment_slots, np.int32), lengths)).to(device)
    count = torch.tensor([len(starts)], dtype=torch.int32).to(device)
    return RowTiles(tiles[0], tiles[1], tiles[2], count, row_slots, tile_rows)


def shrink_rows(x: Tensor, pages: LayerPages, tiles: RowTiles) -> Tensor:
    """Project each row onto the ranks of its adapter: the sum over s of h[s, t, p, :rank] is A[slot of t, p] @ x[t].

    x: [T, in], columns dense. Returns [splits, T, parts, max_rank] float32; cells beyond an adapter's own ranks and
    rows without an adapter hold no meaning and are read by nobody.
    """
    if on_gpu(x):
        from loraplex_kernels.gpu import lora as _gpu  # Triton exists on GPU machines only

        return _gpu.shrink_rows(x, pages, tiles)
    return _reference.shrink_rows(x, pages, tiles)


def expand_rows(h: Tensor, pages: LayerPages, tiles: RowTiles, delta: Tensor) -> None:
    """Write each row's delta, delta[t, columns of p] = B[slot of t, p] @ h[t, p, :rank], where its rank is not 0.

    h: from `shrink_rows`; delta: [T, sum of part_sizes], dense; other cells of it stay as they are.
    """
    if on_gpu(h):
        from loraplex_kernels.gpu import lora as _gpu  # Triton exists on GPU machines only

        _gpu.expand_rows(h, pages, tiles, delta)
    else:
        _reference.expand_rows(h, pages, tiles, delta)


def add_rows(out: Tensor, delta: Tensor, pages: LayerPages, tiles: RowTiles) -> None:
    """Add to each row of `out` [T, sum of part_sizes], in place, the delta of the parts that its adapter touches."""
    if on_gpu(out):
        from loraplex_kernels.gpu import lora as _gpu  # Triton exists on GPU machines only

        _gpu.add_rows(out, delta, pages, tiles)
    else:
        _reference.add_rows(out, delta, pages, tiles)
