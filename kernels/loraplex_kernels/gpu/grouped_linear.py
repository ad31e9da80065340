"""A linear over numbers in groups: each word is loaded once, and its numbers become weights in registers."""

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

if TYPE_CHECKING:
    from loraplex_kernels.grouped_linear import PackedGroups
    from loraplex_kernels.moe_tiles import ExpertTiles

SLICE = 16
WANTED_PROGRAMS = 264  # two for each processor of an H100 or H200
MAX_SPLITS = 16


@triton.jit(do_not_specialize=["num_rows", "split_blocks"])
def _multiply(
    x, x_stride, words, scales, zeros, order, group_of, planes, num_rows, in_size, out_size, num_blocks, split_blocks,
    group_size, tokens, starts, counts, experts, num_tiles, num_groups,
    BITS: tl.constexpr, SLICE: tl.constexpr, HAS_ORDER: tl.constexpr, IS_EVEN: tl.constexpr,
    HAS_EXPERTS: tl.constexpr, IS_BY_TOKEN: tl.constexpr, ROWS: tl.constexpr, OUTPUTS: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    output = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    split = tl.program_id(2)
    is_output = output < out_size
    row = tile * ROWS + tl.arange(0, ROWS)
    is_row = row < num_rows
    source = row
    if HAS_EXPERTS:
        if tile >= tl.load(num_tiles):
            return
        row = tl.load(starts + tile) + tl.arange(0, ROWS)
        is_row = tl.arange(0, ROWS) < tl.load(counts + tile)
        source = row
        if IS_BY_TOKEN:
            source = tl.load(tokens + row, mask=is_row, other=0)
        expert = tl.load(experts + tile).to(tl.int64)
        words += expert * num_blocks * SLICE * out_size
        scales += expert * num_groups * out_size
        zeros += expert * num_groups * out_size
        order += expert * in_size
        group_of += expert * num_blocks * SLICE * (32 // BITS)
    x_row = x + source.to(tl.int64)[:, None] * x_stride
    PER_WORD: tl.constexpr = 32 // BITS
    s = tl.arange(0, SLICE)
    total = tl.zeros((ROWS, OUTPUTS), tl.float32)
    first = split * split_blocks
    for block in range(first, tl.minimum(first + split_blocks, num_blocks)):
        word_cell = (block * SLICE + s).to(tl.int64)[:, None] * out_size + output[None, :]
        packed = tl.load(words + word_cell, mask=is_output[None, :], other=0)
        for field in tl.static_range(PER_WORD):
            place = (block * PER_WORD + field) * SLICE + s
            is_place = place < in_size
            column = place
            if HAS_ORDER:
                column = tl.load(order + place, mask=is_place, other=0)
            numbers = tl.load(x_row + column[None, :], mask=is_row[:, None] & is_place[None, :], other=0.0)
            if IS_EVEN:
                # The groups of a whole slice are one; behind the inputs x is 0, and any group will do.
                group = tl.minimum((block * PER_WORD + field) * SLICE, in_size - 1) // group_size
                scale = tl.load(scales + group * out_size + output, mask=is_output, other=0.0).to(tl.float32)[None, :]
                zero = tl.load(zeros + group * out_size + output, mask=is_output, other=0.0).to(tl.float32)[None, :]
            else:
                groups = tl.load(group_of + place)
                cell = groups[:, None] * out_size + output[None, :]
                scale = tl.load(scales + cell, mask=is_output[None, :], other=0.0).to(tl.float32)
                zero = tl.load(zeros + cell, mask=is_output[None, :], other=0.0).to(tl.float32)
            number = (packed >> (field * BITS)) & ((1 << BITS) - 1)
            weights = ((number.to(tl.float32) - zero) * scale).to(numbers.dtype)
            total = tl.dot(numbers, weights, total, input_precision="ieee")
    cell = row.to(tl.int64)[:, None] * out_size + output[None, :]
    cell += split.to(tl.int64) * num_rows * out_size
    tl.store(planes + cell, total, mask=is_row[:, None] & is_output[None, :])


@triton.jit(do_not_specialize=["num_rows"])
def _finish(
    planes, bias, addend, out, num_rows, out_size,
    SPLITS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_ADDEND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    output = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_output = output < out_size
    cell = row * out_size + output
    total = tl.zeros((BLOCK,), tl.float32)
    plane_size = num_rows.to(tl.int64) * out_size
    for split in tl.static_range(SPLITS):
        total += tl.load(planes + cell + split * plane_size, mask=is_output, other=0.0)
    if HAS_BIAS:
        total += tl.load(bias + output, mask=is_output, other=0.0).to(tl.float32)
    if HAS_ADDEND:
        total += tl.load(addend + cell, mask=is_output, other=0.0).to(tl.float32)
    tl.store(out + cell, total.to(out.dtype.element_ty), mask=is_output)


def grouped_linear(
    x: Tensor, weight: "PackedGroups", bias: Tensor | None = None, addend: Tensor | None = None,
    num_splits: int | None = None,
) -> Tensor:  # fmt: skip
    num_rows = len(x)
    rows, outputs = _tile(num_rows)
    planes = _multiply_splits(x, weight, None, False, num_rows, triton.cdiv(num_rows, rows), rows, outputs, num_splits)
    return _sum_splits(planes, x, bias, addend)


def grouped_expert_linear(
    x: Tensor, weight: "PackedGroups", tiles: "ExpertTiles", is_by_token: bool, num_splits: int | None = None
) -> Tensor:
    num_rows, rows = len(tiles.tokens), tiles.tile_rows
    outputs = 64 if rows <= 16 else 128
    planes = _multiply_splits(x, weight, tiles, is_by_token, num_rows, len(tiles.starts), rows, outputs, num_splits)
    return _sum_splits(planes, x, None, None)


def _multiply_splits(
    x: Tensor, weight: "PackedGroups", tiles: "ExpertTiles | None", is_by_token: bool, num_rows: int,
    num_tiles: int, rows: int, outputs: int, num_splits: int | None,
) -> Tensor:  # fmt: skip
    """The product's summands [splits, num_rows, out] in float32, of programs of so many rows and outputs."""
    in_size, out_size = weight.in_size, weight.words.shape[-1]
    if num_rows == 0:
        return torch.empty(1, 0, out_size, dtype=torch.float32, device=x.device)
    num_blocks = weight.words.shape[-2] // SLICE
    grid = (num_tiles, triton.cdiv(out_size, outputs))
    if num_splits is None:
        num_splits = max(1, min(MAX_SPLITS, WANTED_PROGRAMS // (grid[0] * grid[1])))
    split_blocks = triton.cdiv(num_blocks, min(num_splits, num_blocks))
    num_splits = triton.cdiv(num_blocks, split_blocks)
    planes = torch.empty(num_splits, num_rows, out_size, dtype=torch.float32, device=x.device)
    _multiply[(*grid, num_splits)](
        x, x.stride(0), weight.words, weight.scales, weight.zeros,
        weight.words if weight.order is None else weight.order,
        weight.words if weight.group_of is None else weight.group_of,
        planes, num_rows, in_size, out_size, num_blocks, split_blocks, weight.group_size,
        *((x, x, x, x, x) if tiles is None else _tile_arguments(tiles)), weight.scales.shape[-2],
        BITS=weight.bits, SLICE=SLICE, HAS_ORDER=weight.order is not None, IS_EVEN=weight.group_of is None,
        HAS_EXPERTS=tiles is not None, IS_BY_TOKEN=is_by_token,
        ROWS=rows, OUTPUTS=outputs, num_warps=4 if rows < 64 else 8, num_stages=3,
    )  # fmt: skip
    return planes


def _tile_arguments(tiles: "ExpertTiles") -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return tiles.tokens, tiles.starts, tiles.counts, tiles.experts, tiles.num_tiles


def _sum_splits(planes: Tensor, x: Tensor, bias: Tensor | None, addend: Tensor | None) -> Tensor:
    num_splits, num_rows, out_size = planes.shape
    out = x.new_empty(num_rows, out_size)
    if num_rows == 0:
        return out
    _finish[(num_rows, triton.cdiv(out_size, 1024))](
        planes, x if bias is None else bias, x if addend is None else addend, out, num_rows, out_size,
        SPLITS=num_splits, HAS_BIAS=bias is not None, HAS_ADDEND=addend is not None, BLOCK=1024,
    )  # fmt: skip
    return out


def _tile(num_rows: int) -> tuple[int, int]:
    """Rows and outputs of a program: narrow for decoding, square for prompts."""
    if num_rows <= 16:
        return 16, 64
    if num_rows <= 64:
        return 32, 64
    return 64, 128
