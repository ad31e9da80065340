"""Two forms of a prompt's linear that only kernels of our own can have: measured here, not part of the engine.

`product_and_delta` is a GEMM that adds the rows' adapters to each block of its output before it is written;
`activate_and_add` adds them in the kernel that reads the output next. Either reads what `shrink_rows` has written.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from loraplex_kernels.lora_pages import BLOCK_COLUMNS, PAGE_RANKS, LinearPages, RowTiles

RANK_BLOCK = 16  # the least that tensor cores take
INPUTS = 64
# Tiles of rows whose programs follow each other, so that they find weights and rows in the cache.
NEIGHBOURS = 8


@triton.jit
def _add_ranks(
    total, planes, plane_size, pages, page_table, slot, slot_stride, most_pages, ranks, rank_stride,
    row, is_row, part, part_start, part_end, column, is_column, in_size, room,
    PARTS: tl.constexpr, SPLITS: tl.constexpr, PAGE: tl.constexpr, RANKS: tl.constexpr,
):  # fmt: skip
    """Add B[slot, part] @ h[row, part] to `total`, [rows, columns] float32."""
    rank = tl.load(ranks + slot * rank_stride + part)
    for first_rank in range(0, rank, RANKS):
        r = first_rank + tl.arange(0, RANKS)
        h_cell = planes + (row.to(tl.int64)[:, None] * PARTS + part) * room + r[None, :]
        h = tl.load(h_cell, mask=is_row[:, None], other=0.0)
        for _split in tl.static_range(1, SPLITS):
            h_cell += plane_size
            h += tl.load(h_cell, mask=is_row[:, None], other=0.0)
        page = tl.load(page_table + slot * slot_stride + part * most_pages + r // PAGE, mask=r < rank, other=0)
        page = tl.multiple_of(page, PAGE) + PAGE * in_size + r % PAGE * (part_end - part_start) - part_start
        is_cell = (r < rank)[:, None] & is_column[None, :]
        weights = tl.load(pages + page[:, None] + column[None, :], mask=is_cell, other=0.0)
        total = tl.dot(h.to(weights.dtype), weights, total, input_precision="ieee")
    return total


@triton.jit
def _product_and_delta(
    x, weight, out, planes, plane_size, pages, page_table, slot_stride, most_pages, ranks, rank_stride,
    starts, counts, slots, blocks, borders, num_tiles, num_blocks, in_size, out_size, room,
    ALIGN: tl.constexpr, PARTS: tl.constexpr, SPLITS: tl.constexpr, PAGE: tl.constexpr, RANKS: tl.constexpr,
    ROWS: tl.constexpr, OUTPUTS: tl.constexpr, INPUTS: tl.constexpr, NEIGHBOURS: tl.constexpr,
):  # fmt: skip
    band = tl.program_id(0) // (NEIGHBOURS * num_blocks)
    place = tl.program_id(0) % (NEIGHBOURS * num_blocks)
    height = tl.minimum(num_tiles - band * NEIGHBOURS, NEIGHBOURS)
    tile = band * NEIGHBOURS + place % height
    block = place // height
    start = tl.load(starts + tile)
    first_column = tl.multiple_of(tl.load(blocks + 3 * block + 1), ALIGN)
    total = tl.zeros((ROWS, OUTPUTS), tl.float32)
    for first in range(0, in_size, INPUTS):
        left = x.load([start, first])
        right = weight.load([first_column, first])
        total = tl.dot(left, right.T, total, input_precision="ieee")
    part = tl.load(blocks + 3 * block)
    part_start = tl.multiple_of(tl.load(borders + part), ALIGN)
    part_end = tl.multiple_of(tl.load(blocks + 3 * block + 2), ALIGN)
    column = first_column + tl.arange(0, OUTPUTS)
    row = start + tl.arange(0, ROWS)
    is_row = tl.arange(0, ROWS) < tl.load(counts + tile)
    total = _add_ranks(
        total, planes, plane_size, pages, page_table, tl.load(slots + tile).to(tl.int64), slot_stride, most_pages,
        ranks, rank_stride, row, is_row, part, part_start, part_end, column, column < part_end, in_size, room,
        PARTS, SPLITS, PAGE, RANKS,
    )  # fmt: skip
    cell = out + row.to(tl.int64)[:, None] * out_size + column[None, :]
    tl.store(cell, total.to(out.dtype.element_ty), mask=is_row[:, None] & (column < part_end)[None, :])


@triton.jit
def _activate_and_add(
    out, planes, plane_size, pages, page_table, slot_stride, most_pages, ranks, rank_stride,
    starts, counts, slots, blocks, borders, in_size, out_size, room,
    ALIGN: tl.constexpr, PARTS: tl.constexpr, SPLITS: tl.constexpr, PAGE: tl.constexpr, RANKS: tl.constexpr,
    ROWS: tl.constexpr, OUTPUTS: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    block = tl.program_id(1)
    part = tl.load(blocks + 3 * block)
    part_start = tl.multiple_of(tl.load(borders + part), ALIGN)
    part_end = tl.multiple_of(tl.load(blocks + 3 * block + 2), ALIGN)
    column = tl.multiple_of(tl.load(blocks + 3 * block + 1), ALIGN) + tl.arange(0, OUTPUTS)
    row = tl.load(starts + tile) + tl.arange(0, ROWS)
    is_row = tl.arange(0, ROWS) < tl.load(counts + tile)
    is_cell = is_row[:, None] & (column < part_end)[None, :]
    cell = out + row.to(tl.int64)[:, None] * out_size + column[None, :]
    total = tl.load(cell, mask=is_cell, other=0.0).to(tl.float32)
    total = _add_ranks(
        total, planes, plane_size, pages, page_table, tl.load(slots + tile).to(tl.int64), slot_stride, most_pages,
        ranks, rank_stride, row, is_row, part, part_start, part_end, column, column < part_end, in_size, room,
        PARTS, SPLITS, PAGE, RANKS,
    )  # fmt: skip
    tl.store(cell, (total * tl.sigmoid(tl.maximum(total, -80.0))).to(out.dtype.element_ty), mask=is_cell)


def product_and_delta(x: Tensor, weight: Tensor, h: Tensor, pages: LinearPages, tiles: RowTiles) -> Tensor:
    """Return x @ weight.T with each row's adapters added, [T, out]; `tiles` must cover all rows."""
    out = x.new_empty(len(x), len(weight))
    num_tiles, num_blocks = len(tiles.starts), len(pages.blocks)
    left = TensorDescriptor.from_tensor(x, [tiles.tile_rows, INPUTS])
    right = TensorDescriptor.from_tensor(weight, [BLOCK_COLUMNS, INPUTS])
    _product_and_delta[(num_tiles * num_blocks,)](
        left, right, out, *_delta_arguments(h, pages, tiles),
        num_tiles, num_blocks, x.shape[1], len(weight), h.shape[3],
        **_settings(h, pages, tiles), INPUTS=INPUTS, NEIGHBOURS=NEIGHBOURS, num_warps=8,
        num_stages=4 if x.element_size() == 2 else 2,
    )  # fmt: skip
    return out


def activate_and_add(out: Tensor, h: Tensor, pages: LinearPages, tiles: RowTiles) -> None:
    """Add each row's adapters to a linear's output and put it through SiLU, in place."""
    _activate_and_add[(len(tiles.starts), len(pages.blocks))](
        out, *_delta_arguments(h, pages, tiles), pages.in_size, out.shape[1], h.shape[3],
        **_settings(h, pages, tiles), num_warps=8,
    )  # fmt: skip


def _delta_arguments(h: Tensor, pages: LinearPages, tiles: RowTiles) -> tuple[Any, ...]:
    table, ranks = pages.page_table, pages.ranks
    adapters = pages.cells, table, table.stride(0), table.shape[2], ranks, ranks.stride(0)
    return h, h.stride(0), *adapters, tiles.starts, tiles.counts, tiles.slots, pages.blocks, pages.borders


def _settings(h: Tensor, pages: LinearPages, tiles: RowTiles) -> dict[str, int]:
    return {
        "ALIGN": 16 if all(size % 16 == 0 for size in pages.part_sizes) else 1,
        "PARTS": h.shape[2], "SPLITS": h.shape[0], "PAGE": PAGE_RANKS, "RANKS": RANK_BLOCK,
        "ROWS": tiles.tile_rows, "OUTPUTS": BLOCK_COLUMNS,
    }  # fmt: skip
