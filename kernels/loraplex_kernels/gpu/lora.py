"""Shrink and expand over rank pages: the work follows the tile table in memory, not the grid.

Shrink splits the inputs and writes one plane a split, which expand sums while it loads: no zeros are written first and
nothing is added atomically, so the result does not depend on timing or on what else is in the batch.

A program goes from tile to tile, so a grid made for many costs little where there are few. Each step from one table to
the next waits on the memory, which for few rows is most of the time. So what names the work is asked for at once: where
the compiler would put a load off until it is known to be needed, a loop's limit is made to depend on it (`_after`).
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
# Ranks that are multiplied at once, the least that tensor cores take.
RANK_BLOCK = 16
# Ranks of all parts together that shrink takes at once for prompts, whose inputs are worth reading once.
PREFILL_RANKS = 64
# About as many programs as run at once on an H200, and how many shrink has there for prompts.
PROGRAMS = 1024
PREFILL_PROGRAMS = 132
# Programs that share the ranks of a tile, where tiles are few.
MOST_GROUPS = 4
DECODE_ROWS = 16
BLOCK_COLUMNS = 256
# Numbers that differ from step to step, linear to linear or server to server, and what is read one by one: whether they
# are multiples of 16 must not decide which code is run, or each has its own.
PLAIN = ("num_rows", "slot_stride", "most_pages", "rank_stride")
TABLES = ("page_table", "ranks", "starts", "counts", "slots", "num_tiles", "row_slots", "blocks", "borders")


@triton.jit
def _after(limit, number):
    """The limit of a loop, known only when `number` is, which is never negative."""
    return tl.where(number < 0, 0, limit)


@triton.jit
def _page_of(table, r, most_pages, PAGE: tl.constexpr):
    """Where the page of a rank starts; whether the adapter has that rank is not asked."""
    page = tl.load(table + r // PAGE, mask=r < most_pages * PAGE, other=0)
    return tl.multiple_of(page, PAGE)


@triton.jit(do_not_specialize=PLAIN, do_not_specialize_on_alignment=TABLES)
def _shrink(
    x, x_stride, pages, page_table, slot_stride, most_pages, ranks, rank_stride,
    starts, counts, slots, num_tiles, planes,
    num_rows, in_size, split_size, room,
    PARTS: tl.constexpr, PAGE: tl.constexpr, BLOCK: tl.constexpr,
    ROWS: tl.constexpr, RANKS: tl.constexpr, COLUMNS: tl.constexpr, INPUTS: tl.constexpr,
):  # fmt: skip
    split = tl.program_id(0)
    stride = tl.num_programs(1)
    group_start = tl.program_id(2) * RANKS
    slot = tl.load(slots + tl.program_id(1))
    end = _after(tl.load(num_tiles), slot)
    first = split * split_size
    last = tl.minimum(first + split_size, in_size)
    # A column is a rank of a part; beyond the last part there is none.
    part = tl.arange(0, COLUMNS) // RANKS
    place = tl.arange(0, ROWS)
    for tile in range(tl.program_id(1), end, stride):
        slot_ranks = ranks + slot.to(tl.int64) * rank_stride
        rank = tl.load(slot_ranks + part, mask=part < PARTS, other=0)
        highest = tl.load(slot_ranks)
        for other in tl.static_range(1, PARTS):
            highest = tl.maximum(highest, tl.load(slot_ranks + other))
        table = page_table + slot.to(tl.int64) * slot_stride
        start = tl.load(starts + tile)
        height = tl.load(counts + tile)
        highest = _after(_after(_after(highest, tl.load(table)), start), height)
        table += tl.minimum(part, PARTS - 1) * most_pages
        r = group_start + tl.arange(0, COLUMNS) % RANKS
        page = _page_of(table, r, most_pages, PAGE)
        row = start + place
        is_row = place < height
        for _ in range(group_start, highest, tl.num_programs(2) * RANKS):
            is_rank = r < rank
            # What fills up a block of ranks is written too, as zeros: expand reads whole blocks.
            is_kept = r < tl.cdiv(rank, BLOCK) * BLOCK
            a_row = pages + page + r % PAGE * in_size
            h = tl.zeros((ROWS, COLUMNS), tl.float32)
            for first_input in range(first, last, INPUTS):
                i = first_input + tl.arange(0, INPUTS)
                x_cell = x + row.to(tl.int64)[:, None] * x_stride + i[None, :]
                numbers = tl.load(x_cell, mask=is_row[:, None] & (i < last)[None, :], other=0.0)
                weights = tl.load(a_row[None, :] + i[:, None], mask=is_rank[None, :] & (i < last)[:, None], other=0.0)
                h = tl.dot(numbers, weights, h, input_precision="ieee")
            cell = ((split * num_rows + row).to(tl.int64)[:, None] * PARTS + part[None, :]) * room + r[None, :]
            tl.store(planes + cell, h, mask=is_row[:, None] & is_kept[None, :])
            r += tl.num_programs(2) * RANKS
            page = _page_of(table, r, most_pages, PAGE)
        slot = tl.load(slots + tile + stride, mask=tile + stride < end, other=0)


@triton.jit(do_not_specialize=PLAIN, do_not_specialize_on_alignment=TABLES)
def _expand(
    planes, pages, page_table, slot_stride, most_pages, ranks, rank_stride,
    starts, counts, slots, num_tiles, blocks, borders, delta,
    num_rows, in_size, out_size, room,
    PARTS: tl.constexpr, PAGE: tl.constexpr, ALIGN: tl.constexpr, SPLITS: tl.constexpr,
    ROWS: tl.constexpr, RANKS: tl.constexpr, OUTPUTS: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    stride = tl.num_programs(1)
    # A block of columns lies within one part.
    part = tl.load(blocks + 3 * block)
    slot = tl.load(slots + tl.program_id(1))
    end = _after(_after(tl.load(num_tiles), slot), part)
    part_start = tl.multiple_of(tl.load(borders + part), ALIGN)
    part_end = tl.multiple_of(tl.load(blocks + 3 * block + 2), ALIGN)
    column = tl.multiple_of(tl.load(blocks + 3 * block + 1), ALIGN) + tl.arange(0, OUTPUTS)
    is_column = column < part_end
    place = tl.arange(0, ROWS)
    plane_size = num_rows.to(tl.int64) * (PARTS * room)
    for tile in range(tl.program_id(1), end, stride):
        rank = tl.load(ranks + slot.to(tl.int64) * rank_stride + part)
        table = page_table + slot.to(tl.int64) * slot_stride + part * most_pages
        rank = _after(rank, tl.load(table))
        r = tl.arange(0, RANKS)
        page = _page_of(table, r, most_pages, PAGE)
        row = tl.load(starts + tile) + place
        is_row = place < tl.load(counts + tile)
        total = tl.zeros((ROWS, OUTPUTS), tl.float32)
        for _ in range(0, rank, RANKS):
            # Whole blocks of ranks: reads are wide where their mask does not depend on the rank.
            cell = planes + (row.to(tl.int64)[:, None] * PARTS + part) * room + r[None, :]
            h = tl.zeros((ROWS, RANKS), tl.float32)
            for _split in tl.static_range(SPLITS):
                h += tl.load(cell, mask=is_row[:, None], other=0.0)
                cell += plane_size
            b_row = pages + page + PAGE * in_size + r % PAGE * (part_end - part_start) - part_start
            is_cell = (r < rank)[:, None] & is_column[None, :]
            weights = tl.load(b_row[:, None] + column[None, :], mask=is_cell, other=0.0)
            total = tl.dot(h.to(weights.dtype), weights, total, input_precision="ieee")
            r += RANKS
            page = _page_of(table, r, most_pages, PAGE)
        out = delta + row.to(tl.int64)[:, None] * out_size + column[None, :]
        tl.store(out, total.to(delta.dtype.element_ty), mask=is_row[:, None] & is_column[None, :] & (rank > 0))
        slot = tl.load(slots + tile + stride, mask=tile + stride < end, other=0)


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
    num_parts, most_tiles = len(pages.part_sizes), len(tiles.starts)
    is_decode = tiles.tile_rows <= DECODE_ROWS
    widened = triton.next_power_of_2(num_parts)
    ranks = RANK_BLOCK if is_decode else max(RANK_BLOCK, PREFILL_RANKS // widened)
    # About as many bytes of A a turn, whatever the number of parts.
    inputs = 128 if ranks * widened <= 32 else 64
    if num_splits is None:
        num_splits = splits_for(in_size, tiles.tile_rows, most_tiles)
    split_size = triton.cdiv(in_size, num_splits * inputs) * inputs
    num_splits = triton.cdiv(in_size, split_size)
    room = triton.cdiv(pages.max_rank, RANK_BLOCK) * RANK_BLOCK
    planes = torch.empty(num_splits, num_rows, num_parts, room, dtype=torch.float32, device=x.device)
    if most_tiles == 0:
        return planes
    tile_programs = _tile_programs(most_tiles, num_splits)
    spare = (PROGRAMS if is_decode else PREFILL_PROGRAMS) // (tile_programs * num_splits)
    groups = max(1, min(MOST_GROUPS, triton.cdiv(room, ranks), spare))
    _shrink[(num_splits, tile_programs, groups)](
        x, x.stride(0), *_table_arguments(pages), tiles.starts, tiles.counts, tiles.slots, tiles.num_tiles,
        planes, num_rows, in_size, split_size, room,
        PARTS=num_parts, PAGE=PAGE_RANKS, BLOCK=RANK_BLOCK,
        ROWS=tiles.tile_rows, RANKS=ranks, COLUMNS=ranks * widened, INPUTS=inputs, num_warps=4, num_stages=4,
    )  # fmt: skip
    return planes


def splits_for(in_size: int, tile_rows: int, num_tiles: int) -> int:
    """How many parts the inputs are cut into; for decodes the best measured on one H200 at 1, 8 and 32 adapters."""
    if tile_rows > DECODE_ROWS:
        return max(1, min(4, in_size // 2048))
    return max(1, min(32 if num_tiles == 1 else 16, in_size // 128))


def expand_rows(h: Tensor, pages: "LinearPages", tiles: "RowTiles", delta: Tensor) -> None:
    most_tiles = len(tiles.starts)
    if most_tiles == 0:
        return
    num_splits, num_rows, num_parts, room = h.shape
    blocks = pages.blocks
    is_decode = tiles.tile_rows <= DECODE_ROWS
    _expand[(len(blocks), _tile_programs(most_tiles, len(blocks)))](
        h, *_table_arguments(pages), tiles.starts, tiles.counts, tiles.slots, tiles.num_tiles, blocks, pages.borders,
        delta, num_rows, pages.in_size, delta.shape[1], room,
        PARTS=num_parts, PAGE=PAGE_RANKS, ALIGN=_alignment(pages), SPLITS=num_splits,
        ROWS=tiles.tile_rows, RANKS=RANK_BLOCK, OUTPUTS=BLOCK_COLUMNS, num_warps=4 if is_decode else 8, num_stages=2,
    )  # fmt: skip


def _tile_programs(most_tiles: int, programs_of_a_tile: int) -> int:
    """How many programs share the tiles, if all are to run at once and each has as many tiles as the others."""
    turns = -(-most_tiles * programs_of_a_tile // PROGRAMS)
    return -(-most_tiles // turns)


def add_rows(out: Tensor, delta: "RowDelta") -> None:
    if len(out):
        blocks = delta.pages.blocks
        _add[(len(out), len(blocks))](
            out,
            *delta_arguments(delta, out),
            blocks,
            out.shape[1],
            ALIGN=_alignment(delta.pages),
            OUTPUTS=BLOCK_COLUMNS,
            num_warps=2,
        )


def _alignment(pages: "LinearPages") -> int:
    """What all parts' columns are multiples of: with 16, loads are as wide as they can be."""
    return 16 if all(size % 16 == 0 for size in pages.part_sizes) else 1


def _table_arguments(pages: "LinearPages") -> tuple[Tensor, Tensor, int, int, Tensor, int]:
    table, ranks = pages.page_table, pages.ranks
    return pages.cells, table, table.stride(0), table.shape[2], ranks, ranks.stride(0)
