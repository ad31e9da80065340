"""Mixtures of experts in Triton: choosing, ordering and cutting rows, and one product for all experts.

Rows are placed by counting, without atomic operations: each expert's program counts those before its own. So the order
does not depend on timing, and nothing is asked of the device.
"""

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from loraplex_kernels.gpu.delta import TABLES, delta_arguments, rank_of

if TYPE_CHECKING:
    from loraplex_kernels.lora_pages import RowDelta
    from loraplex_kernels.moe_tiles import ExpertTiles

FEW_ROWS = 16
SCAN_BLOCKS = (1024, 4096)  # choices that a program reads at once, for few and for many
SUM_COLUMNS = 512
CUT = ("starts", "counts", "slots")  # parts of one tensor


@triton.jit
def _choose_experts(
    scores, score_stride, weights, experts, num_experts, num_chosen,
    RESCALES: tl.constexpr, CHOICES: tl.constexpr, EXPERTS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    expert = tl.arange(0, EXPERTS)
    place = tl.arange(0, CHOICES)
    is_expert = expert < num_experts
    numbers = tl.load(scores + token * score_stride + expert, mask=is_expert, other=float("-inf")).to(tl.float32)
    highest = tl.max(numbers, 0)
    shares = tl.exp(numbers - tl.where(highest == float("-inf"), 0.0, highest))
    total = tl.sum(shares, 0)
    shares = tl.where(is_expert, shares, -1.0)
    chosen = tl.zeros((CHOICES,), tl.int32)
    kept = tl.zeros((CHOICES,), tl.float32)
    for choice in range(num_chosen):
        best = tl.max(shares, 0)
        # Where there is no highest number, an expert that exists all the same: its weights are memory that is ours.
        found = tl.min(tl.where(shares == best, expert, num_experts - 1), 0)
        chosen = tl.where(place == choice, found, chosen)
        kept = tl.where(place == choice, best / total, kept)
        shares = tl.where(expert == found, -1.0, shares)
    if RESCALES:
        kept = kept / tl.sum(kept, 0)
    cell = token * num_chosen + place
    tl.store(experts + cell, chosen, mask=place < num_chosen)
    tl.store(weights + cell, kept, mask=place < num_chosen)


@triton.jit(do_not_specialize=["num_rows"])
def _count(experts, counts, num_rows, BLOCK: tl.constexpr):
    expert = tl.program_id(0)
    total = tl.zeros((BLOCK,), tl.int32)
    for first in range(0, num_rows, BLOCK):
        choice = first + tl.arange(0, BLOCK)
        chosen = tl.load(experts + choice, mask=choice < num_rows, other=-1)
        total += (chosen == expert).to(tl.int32)
    tl.store(counts + expert, tl.sum(total, 0))


@triton.jit(do_not_specialize=["num_rows"], do_not_specialize_on_alignment=["token_slots"])
def _place(
    experts, expert_counts, token_slots, rows, tokens, row_slots, starts, counts, owners, num_tiles,
    num_rows, num_chosen, num_experts,
    HAS_SLOTS: tl.constexpr, TILE_ROWS: tl.constexpr, EXPERTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    expert = tl.program_id(0)
    other = tl.arange(0, EXPERTS)
    sizes = tl.load(expert_counts + other, mask=other < num_experts, other=0)
    heights = (sizes + TILE_ROWS - 1) // TILE_ROWS
    start = tl.sum(tl.where(other < expert, sizes, 0), 0)
    size = tl.sum(tl.where(other == expert, sizes, 0), 0)
    first_tile = tl.sum(tl.where(other < expert, heights, 0), 0)
    taken = start
    for first in range(0, num_rows, BLOCK):
        choice = first + tl.arange(0, BLOCK)
        is_mine = tl.load(experts + choice, mask=choice < num_rows, other=-1) == expert
        row = taken + tl.cumsum(is_mine.to(tl.int32), 0) - 1
        token = choice // num_chosen
        tl.store(rows + choice, row, mask=is_mine)
        tl.store(tokens + row, token, mask=is_mine)
        if HAS_SLOTS:
            slot = tl.load(token_slots + token, mask=is_mine, other=-1)
            tl.store(row_slots + row, tl.where(slot < 0, -1, slot * num_experts + expert), mask=is_mine)
        taken += tl.sum(is_mine.to(tl.int32), 0)
    for first in range(0, size, BLOCK * TILE_ROWS):
        place = first + tl.arange(0, BLOCK) * TILE_ROWS
        is_tile = place < size
        tile = first_tile + place // TILE_ROWS
        tl.store(starts + tile, start + place, mask=is_tile)
        tl.store(counts + tile, tl.minimum(size - place, TILE_ROWS), mask=is_tile)
        tl.store(owners + tile, expert, mask=is_tile)
    if expert == num_experts - 1:
        tl.store(num_tiles, tl.sum(heights, 0))


@triton.jit(do_not_specialize=["num_rows"], do_not_specialize_on_alignment=CUT)
def _cut(
    row_slots, starts, counts, slots, num_tiles, num_rows,
    TILE_ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # A program cuts one run of TILE_ROWS rows, and counts the tiles of all before it.
    group = tl.program_id(0)
    begin = group * TILE_ROWS
    before = tl.zeros((BLOCK,), tl.int32)
    for first in range(0, begin, BLOCK):
        row = first + tl.arange(0, BLOCK)
        slot = tl.load(row_slots + row, mask=row < begin, other=-1)
        last = tl.load(row_slots + row - 1, mask=(row < begin) & (row % TILE_ROWS > 0), other=-1)
        before += ((slot >= 0) & (slot != last)).to(tl.int32)
    first_tile = tl.sum(before, 0)
    row = begin + tl.arange(0, TILE_ROWS)
    slot = tl.load(row_slots + row, mask=row < num_rows, other=-1)
    last = tl.load(row_slots + row - 1, mask=(row < num_rows) & (row > begin), other=-1)
    is_start = ((slot >= 0) & (slot != last)).to(tl.int32)
    tile = tl.where(slot >= 0, tl.cumsum(is_start, 0), 0)
    size = tl.sum((tile[:, None] == tile[None, :]).to(tl.int32), 1)
    place = first_tile + tile - 1
    tl.store(starts + place, row, mask=is_start > 0)
    tl.store(counts + place, size, mask=is_start > 0)
    tl.store(slots + place, slot, mask=is_start > 0)
    if group == tl.num_programs(0) - 1:
        tl.store(num_tiles, first_tile + tl.sum(is_start, 0))


@triton.jit
def _multiply_experts(
    x, x_stride, tokens, weights, expert_stride, out, starts, counts, experts, num_tiles, in_size, out_size,
    IS_BY_TOKEN: tl.constexpr, ROWS: tl.constexpr, OUTPUTS: tl.constexpr, INPUTS: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    if tile >= tl.load(num_tiles):
        return
    place = tl.arange(0, ROWS)
    row = (tl.load(starts + tile) + place).to(tl.int64)
    is_row = place < tl.load(counts + tile)
    source = row
    if IS_BY_TOKEN:
        source = tl.load(tokens + row, mask=is_row, other=0).to(tl.int64)
    output = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    is_output = output < out_size
    weight = weights + tl.load(experts + tile).to(tl.int64) * expert_stride + output.to(tl.int64)[None, :] * in_size
    numbers = x + source[:, None] * x_stride
    total = tl.zeros((ROWS, OUTPUTS), tl.float32)
    for first in range(0, in_size, INPUTS):
        i = first + tl.arange(0, INPUTS)
        is_input = i < in_size
        left = tl.load(numbers + i[None, :], mask=is_row[:, None] & is_input[None, :], other=0.0)
        right = tl.load(weight + i[:, None], mask=is_input[:, None] & is_output[None, :], other=0.0)
        total = tl.dot(left, right, total, input_precision="ieee")
    cell = out + row[:, None] * out_size + output[None, :]
    tl.store(cell, total.to(out.dtype.element_ty), mask=is_row[:, None] & is_output[None, :])


@triton.jit(do_not_specialize_on_alignment=TABLES)
def _sum_choices(
    rows, delta, row_slots, ranks, rank_stride, places, weights, out, size, num_chosen,
    HAS_DELTA: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_column = column < size
    total = tl.zeros((BLOCK,), tl.float32)
    for choice in range(num_chosen):
        row = tl.load(places + token * num_chosen + choice).to(tl.int64)
        numbers = tl.load(rows + row * size + column, mask=is_column, other=0.0).to(tl.float32)
        if HAS_DELTA:
            if rank_of(row_slots, ranks, rank_stride, row, 0) > 0:
                numbers += tl.load(delta + row * size + column, mask=is_column, other=0.0).to(tl.float32)
        total += tl.load(weights + token * num_chosen + choice) * numbers
    tl.store(out + token * size + column, total.to(out.dtype.element_ty), mask=is_column)


def route_rows(
    scores: Tensor, num_chosen: int, rescales: bool, token_slots: Tensor | None, tile_rows: int
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor, Tensor, Tensor, Tensor]:
    num_tokens, num_experts = scores.shape
    num_rows = num_tokens * num_chosen
    most = min(num_rows, num_experts) + num_rows // tile_rows

    def indices(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int32, device=scores.device)

    experts, expert_counts = indices(num_tokens, num_chosen), indices(num_experts)
    weights = torch.empty(num_tokens, num_chosen, dtype=torch.float32, device=scores.device)
    rows, tokens = indices(num_tokens, num_chosen), indices(num_rows)
    row_slots = None if token_slots is None else indices(num_rows)
    starts, counts, owners, num_tiles = indices(most), indices(most), indices(most), indices(1)
    if num_rows == 0:
        return weights, rows, tokens, row_slots, starts, counts, owners, num_tiles.zero_()
    width = triton.next_power_of_2(num_experts)
    _choose_experts[(num_tokens,)](
        scores, scores.stride(0), weights, experts, num_experts, num_chosen,
        RESCALES=rescales, CHOICES=triton.next_power_of_2(num_chosen), EXPERTS=width, num_warps=1,
    )  # fmt: skip
    block = _scan_block(num_rows)
    _count[(num_experts,)](experts, expert_counts, num_rows, BLOCK=block)
    _place[(num_experts,)](
        experts, expert_counts, tokens if token_slots is None else token_slots, rows, tokens,
        tokens if row_slots is None else row_slots, starts, counts, owners, num_tiles,
        num_rows, num_chosen, num_experts,
        HAS_SLOTS=token_slots is not None, TILE_ROWS=tile_rows, EXPERTS=width, BLOCK=block,
    )  # fmt: skip
    return weights, rows, tokens, row_slots, starts, counts, owners, num_tiles


def cut_rows(row_slots: Tensor, tile_rows: int, most: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    num_rows = len(row_slots)
    starts, counts, slots = row_slots.new_empty(3, most).unbind(0)
    num_tiles = row_slots.new_empty(1)
    if num_rows == 0:
        return starts, counts, slots, num_tiles.zero_()
    _cut[(triton.cdiv(num_rows, tile_rows),)](
        row_slots, starts, counts, slots, num_tiles, num_rows, TILE_ROWS=tile_rows, BLOCK=_scan_block(num_rows)
    )
    return starts, counts, slots, num_tiles


def _scan_block(num_rows: int) -> int:
    few, many = SCAN_BLOCKS
    return few if num_rows <= few else many


def expert_linear(x: Tensor, weight: Tensor, tiles: "ExpertTiles", is_by_token: bool) -> Tensor:
    _, out_size, in_size = weight.shape
    out = x.new_empty(len(tiles.tokens), out_size)
    if len(out):
        rows = tiles.tile_rows
        outputs, inputs, warps = (64, 128, 4) if rows <= FEW_ROWS else (128, 64, 8)
        _multiply_experts[(len(tiles.starts), triton.cdiv(out_size, outputs))](
            x, x.stride(0), tiles.tokens, weight, weight.stride(0), out, tiles.starts, tiles.counts, tiles.experts,
            tiles.num_tiles, in_size, out_size,
            IS_BY_TOKEN=is_by_token, ROWS=rows, OUTPUTS=outputs, INPUTS=inputs, num_warps=warps, num_stages=3,
        )  # fmt: skip
    return out


def sum_rows(rows: Tensor, tiles: "ExpertTiles", delta: "RowDelta | None") -> Tensor:
    num_tokens, num_chosen = tiles.rows.shape
    size = rows.shape[1]
    out = rows.new_empty(num_tokens, size)
    if num_tokens:
        _sum_choices[(num_tokens, triton.cdiv(size, SUM_COLUMNS))](
            rows, *delta_arguments(delta, rows), tiles.rows, tiles.weights, out, size, num_chosen,
            HAS_DELTA=delta is not None, BLOCK=SUM_COLUMNS,
        )  # fmt: skip
    return out
