"""Shrink and expand over rank pages: the work follows the tile table in memory, not the grid.

Shrink splits the inputs and writes one plane a split, which expand sums while it loads: no zeros are written first and
nothing is added atomically, so the result does not depend on timing or on what else is in the batch.
"""

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from loraplex_kernels.gpu.delta import delta_arguments, rank_of

if TYPE_CHECKING:
    from loraplex_kernels.lora_pages import LinearPages, RowDelta, RowTiles

PAGE_RANKS = 8
RANK_BLOCK = 16
# Programs of one tile and part that share its rank blocks: adapters of up to 64 ranks take one turn each.
RANK_GROUPS = 4
DECODE_ROWS = 16
DECODE_COLUMNS, PREFILL_COLUMNS = 256, 128
# What is read one by one: where it starts must not decide which code it is read by, or each linear has its own.
TABLES = ("page_table", "ranks", "starts", "counts", "slots", "num_tiles", "row_slots", "blocks", "borders")


@triton.jit(do_not_specialize=["num_rows"], do_not_specialize_on_alignment=TABLES)
def _shrink(
    x, x_stride, pages, page_table, slot_stride, most_pages, ranks, rank_stride,
    starts, counts, slots, num_tiles, planes,
    num_rows, in_size, split_size, max_rank,
    PARTS: tl.constexpr, PAGE: tl.constexpr, GROUPS: tl.constexpr,
    ROWS: tl.constexpr, RANKS: tl.constexpr, INPUTS: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    part = tl.program_id(1) % PARTS
    group = tl.program_id(1) // PARTS
    split = tl.program_id(2)
    if tile >= tl.load(num_tiles):
        return
    slot = tl.load(slots + tile).to(tl.int64)
    rank = tl.load(ranks + slot * rank_stride + part)
    place = tl.arange(0, ROWS)
    row = tl.load(starts + tile) + place
    is_row = place < tl.load(counts + tile)
    first = split * split_size
    last = tl.minimum(first + split_size, in_size)
    for first_rank in range(group * RANKS, rank, GROUPS * RANKS):
        r = first_rank + tl.arange(0, RANKS)
        page = tl.load(page_table + slot * slot_stride + part * most_pages + r // PAGE, mask=r < rank, other=0)
        page = tl.multiple_of(page, PAGE)
        a_row = pages + page + r % PAGE * in_size
        h = tl.zeros((ROWS, RANKS), tl.float32)
        for start in range(first, last, INPUTS):
            i = start + tl.arange(0, INPUTS)
            x_cell = x + row.to(tl.int64)[:, None] * x_stride + i[None, :]
            numbers = tl.load(x_cell, mask=is_row[:, None] & (i < last)[None, :], other=0.0)
            weights = tl.load(a_row[None, :] + i[:, None], mask=(r < rank)[None, :] & (i < last)[:, None], other=0.0)
            h = tl.dot(numbers, weights, h, input_precision="ieee")
        cell = ((split * num_rows + row).to(tl.int64)[:, None] * PARTS + part) * max_rank + r[None, :]
        tl.store(planes + cell, h, mask=is_row[:, None] & (r < rank)[None, :])


@triton.jit(do_not_specialize=["num_rows"], do_not_specialize_on_alignment=TABLES)
def _expand(
    planes, pages, page_table, slot_stride, most_pages, ranks, rank_stride,
    starts, counts, slots, num_tiles, blocks, borders, delta,
    num_rows, in_size, out_size, max_rank,
    PARTS: tl.constexpr, PAGE: tl.constexpr, ALIGN: tl.constexpr, SPLITS: tl.constexpr,
    ROWS: tl.constexpr, RANKS: tl.constexpr, OUTPUTS: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    block = tl.program_id(1)
    if tile >= tl.load(num_tiles):
        return
    # A block of columns lies within one part.
    part = tl.load(blocks + 3 * block)
    part_start = tl.multiple_of(tl.load(borders + part), ALIGN)
    part_end = tl.multiple_of(tl.load(blocks + 3 * block + 2), ALIGN)
    column = tl.multiple_of(tl.load(blocks + 3 * block + 1), ALIGN) + tl.arange(0, OUTPUTS)
    is_column = column < part_end
    slot = tl.load(slots + tile).to(tl.int64)
    rank = tl.load(ranks + slot * rank_stride + part)
    if rank == 0:
        return
    place = tl.arange(0, ROWS)
    row = tl.load(starts + tile) + place
    is_row = place < tl.load(counts + tile)
    total = tl.zeros((ROWS, OUTPUTS), tl.float32)
    plane_size = num_rows.to(tl.int64) * (PARTS * max_rank)
    for first_rank in range(0, rank, RANKS):
        r = first_rank + tl.arange(0, RANKS)
        is_cell = is_row[:, None] & (r < rank)[None, :]
        cell = (row.to(tl.int64)[:, None] * PARTS + part) * max_rank + r[None, :]
        h = tl.zeros((ROWS, RANKS), tl.float32)
        for split in tl.static_range(SPLITS):
            h += tl.load(planes + cell + split * plane_size, mask=is_cell, other=0.0)
        page = tl.load(page_table + slot * slot_stride + part * most_pages + r // PAGE, mask=r < rank, other=0)
        page = tl.multiple_of(page, PAGE)
        b_row = pages + page + PAGE * in_size + r % PAGE * (part_end - part_start) - part_start
        weights = tl.load(b_row[:, None] + column[None, :], mask=(r < rank)[:, None] & is_column[None, :], other=0.0)
        total = tl.dot(h.to(weights.dtype), weights, total, input_precision="ieee")
    out = delta + row.to(tl.int64)[:, None] * out_size + column[None, :]
    tl.store(out, total.to(delta.dtype.element_ty), mask=is_row[:, None] & is_column[None, :])


@triton.jit(do_not_specialize_on_alignment=TABLES)
def _add(out, delta, row_slots, ranks, rank_stride, blocks, out_size, ALIGN: tl.constexpr, OUTPUTS: tl.constexpr):
    row = tl.program_id(0)
    block = tl.program_id(1)
    if rank_of(row_slots, ranks, rank_stride, row, tl.load(blocks + 3 * block)) == 0:
        return
    column = tl.multiple_of(tl.load(blocks + 3 * block + 1), ALIGN) + tl.arange(0, OUTPUTS)
    is_column = column < tl.load(blocks + 3 * block + 2)
    cell = row.to(tl.int64) * out_size + column
    total = tl.load(out + cell, mask=is_column).to(tl.float32) + tl.load(delta + cell, mask=is_column).to(tl.float32)
    tl.store(out + cell, total.to(out.dtype.element_ty), mask=is_column)


def shrink_rows(x: Tensor, pages: "LinearPages", tiles: "RowTiles", num_splits: int | None = None) -> Tensor:
    num_rows, in_size = x.shape
    num_parts, max_rank, most_tiles = len(pages.part_sizes), pages.max_rank, len(tiles.starts)
    block = 128 if tiles.tile_rows <= DECODE_ROWS else 64
    if num_splits is None:
        num_splits = splits_for(in_size, tiles.tile_rows, most_tiles)
    split_size = -(-in_size // (num_splits * block)) * block
    num_splits = -(-in_size // split_size)
    planes = torch.empty(num_splits, num_rows, num_parts, max_rank, dtype=torch.float32, device=x.device)
    if most_tiles == 0:
        return planes
    groups = min(RANK_GROUPS, -(-max_rank // RANK_BLOCK))
    _shrink[(most_tiles, num_parts * groups, num_splits)](
        x, x.stride(0), *_table_arguments(pages), tiles.starts, tiles.counts, tiles.slots, tiles.num_tiles,
        planes, num_rows, in_size, split_size, max_rank,
        PARTS=num_parts, PAGE=PAGE_RANKS, GROUPS=groups,
        ROWS=tiles.tile_rows, RANKS=RANK_BLOCK, INPUTS=block, num_warps=4, num_stages=3,
    )  # fmt: skip
    return planes


def splits_for(in_size: int, tile_rows: int, num_tiles: int) -> int:
    """How many parts the inputs are cut into; the best measured on one H200 at 1, 8 and 32 adapters."""
    if tile_rows > DECODE_ROWS:
        return 1 if num_tiles > 32 else 2
    wanted = 32 if num_tiles == 1 else 16
    return max(1, min(wanted, in_size // 128))


def expand_rows(h: Tensor, pages: "LinearPages", tiles: "RowTiles", delta: Tensor) -> None:
    most_tiles = len(tiles.starts)
    if most_tiles == 0:
        return
    num_splits, num_rows, num_parts, max_rank = h.shape
    width = DECODE_COLUMNS if tiles.tile_rows <= DECODE_ROWS else PREFILL_COLUMNS
    blocks = pages.blocks[width]
    _expand[(most_tiles, len(blocks))](
        h, *_table_arguments(pages), tiles.starts, tiles.counts, tiles.slots, tiles.num_tiles, blocks, pages.borders,
        delta, num_rows, pages.in_size, delta.shape[1], max_rank,
        PARTS=num_parts, PAGE=PAGE_RANKS, ALIGN=_alignment(pages), SPLITS=num_splits,
        ROWS=tiles.tile_rows, RANKS=RANK_BLOCK, OUTPUTS=width, num_warps=4, num_stages=2,
    )  # fmt: skip


def add_rows(out: Tensor, delta: "RowDelta") -> None:
    if len(out):
        blocks = delta.pages.blocks[DECODE_COLUMNS]
        _add[(len(out), len(blocks))](
            out,
            *delta_arguments(delta, out),
            blocks,
            out.shape[1],
            ALIGN=_alignment(delta.pages),
            OUTPUTS=DECODE_COLUMNS,
            num_warps=2,
        )


def _alignment(pages: "LinearPages") -> int:
    """What all parts' columns are multiples of: with 16, loads are as wide as they can be."""
    return 16 if all(size % 16 == 0 for size in pages.part_sizes) else 1


def _table_arguments(pages: "LinearPages") -> tuple[Tensor, Tensor, int, int, Tensor, int]:
    table, ranks = pages.page_table, pages.ranks
    return pages.cells, table, table.stride(0), table.shape[2], ranks, ranks.stride(0)
