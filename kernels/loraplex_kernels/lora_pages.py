"""Adapters on a GPU in rank pages, and the LoRA delta of a batch whose rows have different adapters.

The layout. A page holds PAGE_RANKS ranks of one module of one layer: first their rows of A, each `in_size` long, then
the same rows of B transposed, each as long as the module's output. The rank is the outer dimension of both, so every
row is dense whatever the rank. Scaling is part of B. For each slot and module a table names where its pages start, so
pages may lie anywhere and in any order: those of all modules and layers of a class side by side, as
`loraplex_models.adapters.pages` counts them, or all pages of an adapter in one block. The ranks say what of a page is
valid: what stands beyond may be anything, so neither putting an adapter in nor taking it out writes zeros.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from loraplex_kernels.dispatch import on_gpu
from loraplex_kernels.reference import lora_pages as _reference
from loraplex_kernels.streams import beside

PAGE_RANKS = 8
# Rows of a tile: the least that tensor cores multiply, for decoding; more for prompts, which have long runs of rows.
DECODE_TILE_ROWS = 16
PREFILL_TILE_ROWS = 64
# Columns of a block, which lies within one part.
BLOCK_COLUMNS = 256


@dataclass(frozen=True, slots=True)
class LinearPages:
    """One linear layer's adapters: what the kernels read. Addresses stay the same while the server lives.

    The layer may fuse several modules (q, k and v), its parts: each reads the whole input and writes its own columns.
    """

    cells: Tensor  # the memory of all pages
    page_table: Tensor  # [slots, parts, most pages] int64: where a page starts in `cells`
    ranks: Tensor  # [slots, parts] int32, 0: the adapter does not touch the part
    blocks: Tensor  # [blocks, 3] int32: a block's part, its first column, its part's end
    borders: Tensor  # [parts + 1] int32: where each part's columns start in the output, and their end
    in_size: int
    part_sizes: tuple[int, ...]

    @property
    def max_rank(self) -> int:
        """The highest rank that the table has room for."""
        return self.page_table.shape[2] * PAGE_RANKS


# By linear and part an adapter's rank there, and where its pages start.
Modules = Mapping[tuple[int, int], tuple[int, Sequence[int]]]


@dataclass(frozen=True, slots=True)
class TableRows:
    """The tables' rows of a slot or of neighbouring ones, in host memory that a GPU reads without the host."""

    starts: Tensor  # [slots, all parts, most pages] int64
    ranks: Tensor  # [slots, all parts] int32


class RankPages:
    """The page tables of all linears and slots. Who has which page is decided elsewhere."""

    def __init__(
        self, cells: Tensor, linears: Sequence[tuple[int, Sequence[int]]], *, num_slots: int, max_rank: int
    ) -> None:
        """Tables over `cells`, the memory of all pages; `linears`: input size and part sizes of each."""
        device = cells.device
        self._cells = cells
        self._linears = [(in_size, tuple(part_sizes)) for in_size, part_sizes in linears]
        counts = [len(part_sizes) for _, part_sizes in self._linears]
        self._first = [sum(counts[:index]) for index in range(len(counts))]
        num_parts, most_pages = sum(counts), -(-max_rank // PAGE_RANKS)
        # A slot's rows lie together, so that one copy each changes them.
        self._page_table = torch.zeros(num_slots, num_parts, most_pages, dtype=torch.int64, device=device)
        self._ranks = torch.zeros(num_slots, num_parts, dtype=torch.int32, device=device)
        shapes = {part_sizes for _, part_sizes in self._linears}
        self._blocks = {shape: _column_blocks(shape).to(device) for shape in shapes}
        self._borders = {shape: torch.tensor([0, *np.cumsum(shape)], dtype=torch.int32).to(device) for shape in shapes}

    def linear(self, index: int) -> LinearPages:
        """Return one linear's view, good for as long as the tables live."""
        in_size, part_sizes = self._linears[index]
        parts = slice(self._first[index], self._first[index] + len(part_sizes))
        return LinearPages(
            self._cells, self._page_table[:, parts], self._ranks[:, parts],
            self._blocks[part_sizes], self._borders[part_sizes], in_size, part_sizes,
        )  # fmt: skip

    def rows(self, *slots: Modules) -> TableRows:
        """The tables' rows of neighbouring slots with these modules. Any thread may ask."""
        is_gpu = self._cells.is_cuda
        starts = torch.zeros(len(slots), *self._page_table.shape[1:], dtype=torch.int64, pin_memory=is_gpu)
        ranks = torch.zeros(len(slots), self._ranks.shape[1], dtype=torch.int32, pin_memory=is_gpu)
        starts_there, ranks_there = starts.numpy(), ranks.numpy()
        for slot, modules in enumerate(slots):
            for (linear, part), (rank, pages) in modules.items():
                place = self._first[linear] + part
                assert len(pages) == -(-rank // PAGE_RANKS), f"{len(pages)} pages for rank {rank}"
                starts_there[slot, place, : len(pages)] = pages
                ranks_there[slot, place] = rank
        return TableRows(starts, ranks)

    def put(self, slot: int, modules: Modules) -> None:
        """Let a slot have an adapter, whose modules are as `rows` wants them."""
        self.put_rows(slot, self.rows(modules))

    def put_rows(self, first_slot: int, rows: TableRows) -> None:
        """Let a slot, or neighbouring ones, have an adapter; the host does not wait."""
        # torch keeps pinned memory until the copies that read it are done.
        self._page_table[first_slot : first_slot + len(rows.ranks)].copy_(rows.starts, non_blocking=True)
        self._ranks[first_slot : first_slot + len(rows.ranks)].copy_(rows.ranks, non_blocking=True)

    def clear(self, first_slot: int, num_slots: int = 1) -> None:
        """Let slots have no adapter."""
        self._ranks[first_slot : first_slot + num_slots].zero_()


def write_pages(pages: Tensor, a: Tensor, b: Tensor) -> None:
    """Lay A [rank, in] and B [out, rank] of one module out in its pages [ceil(rank / 8), 8 * (in + out)], in place."""
    (rank, in_size), out_size = a.shape, len(b)
    num_pages = len(pages)
    for rows, size, start in ((a, in_size, 0), (b.t(), out_size, PAGE_RANKS * in_size)):
        cells = pages.narrow(1, start, PAGE_RANKS * size)
        whole = rank // PAGE_RANKS
        if whole:
            cells[:whole].copy_(rows[: whole * PAGE_RANKS].reshape(whole, -1))
        if whole < num_pages:
            last = rows[whole * PAGE_RANKS :].reshape(-1)
            cells[whole, : len(last)].copy_(last)


def _column_blocks(part_sizes: Sequence[int]) -> Tensor:
    blocks: list[tuple[int, int, int]] = []
    end = 0
    for part, size in enumerate(part_sizes):
        start, end = end, end + size
        blocks += [(part, first, end) for first in range(start, end, BLOCK_COLUMNS)]
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


@dataclass(frozen=True, slots=True)
class RowDelta:
    """What a linear's adapters add to its output: computed, and left to the operation that reads the output."""

    values: Tensor  # [T, sum of part_sizes]; holds meaning where the row's adapter touches the part
    pages: LinearPages
    tiles: RowTiles

    @property
    def num_parts(self) -> int:
        """Parts of the linear."""
        return len(self.pages.part_sizes)


def shrink_rows(x: Tensor, pages: LinearPages, tiles: RowTiles) -> Tensor:
    """Project each row onto the ranks of its adapter: the sum over s of h[s, t, p, :rank] is A[slot of t, p] @ x[t].

    x: [T, in], columns dense. Returns [splits, T, parts, most ranks] float32; cells of rows without an adapter, and of
    ranks beyond the adapter's own, hold no meaning for anyone but `expand_rows`.
    """
    if on_gpu(x):
        from loraplex_kernels.gpu import lora as _gpu  # Triton exists on GPU machines only

        return _gpu.shrink_rows(x, pages, tiles)
    return _reference.shrink_rows(x, pages, tiles)


def expand_rows(h: Tensor, pages: LinearPages, tiles: RowTiles, delta: Tensor) -> None:
    """Write each row's delta, delta[t, columns of p] = B[slot of t, p] @ h[t, p, :rank], where its rank is not 0.

    h: from `shrink_rows`; delta: [T, sum of part_sizes], dense; other cells of it stay as they are.
    """
    if on_gpu(h):
        from loraplex_kernels.gpu import lora as _gpu  # Triton exists on GPU machines only

        _gpu.expand_rows(h, pages, tiles, delta)
    else:
        _reference.expand_rows(h, pages, tiles, delta)


def row_delta(x: Tensor, pages: LinearPages, tiles: RowTiles, product: Callable[[], Tensor]) -> tuple[Tensor, RowDelta]:
    """Compute a linear's product and, on a GPU at the same time, the delta of its adapters; returns both.

    x: [T, in], columns dense; `product` gives [T, sum of part_sizes].
    """
    values = x.new_empty(len(x), sum(pages.part_sizes))
    with beside(x) as side:
        with side:
            expand_rows(shrink_rows(x, pages, tiles), pages, tiles, values)
        out = product()
    return out, RowDelta(values, pages, tiles)


def add_rows(out: Tensor, delta: RowDelta) -> None:
    """Add to each row of `out` [T, sum of part_sizes], in place, the delta of the parts that its adapter touches."""
    if on_gpu(out):
        from loraplex_kernels.gpu import lora as _gpu  # Triton exists on GPU machines only

        _gpu.add_rows(out, delta)
    else:
        _reference.add_rows(out, delta)
