"""A linear over numbers in groups: each word is loaded once, and its numbers become weights in registers."""

import math
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
# From so many rows on the weight is written out, in parts of so many bytes, and multiplied by the library.
MANY_ROWS = 257
WIDE_BYTES = 64 * 2**20
WIDE_OUTPUTS = 1024

# A whole number becomes a float by its bits: 2 ** 11 has 23 bits behind it, of which the lowest is worth 2 ** -12. A
# field of 16 bits put there as it stands is 2 ** 11 plus the number times 2 ** (place - 12). That factor is no matter:
# it is exact, half precision has room for it, and the scale makes up for it.
FLOAT_BITS = tl.constexpr(0x45000000)
FLOAT_START = tl.constexpr(2048.0)
FLOAT_PLACE = tl.constexpr(12)


@triton.jit
def _of_group(numbers, group, out_size, output, IS_TURNED: tl.constexpr):
    """A group's scales or zeros, one for each output of a tile."""
    found = tl.load(numbers + group * out_size + output, mask=output < out_size, other=0.0).to(tl.float32)
    return found[:, None] if IS_TURNED else found[None, :]


@triton.jit(do_not_specialize=["num_rows", "split_blocks"])
def _multiply(
    x, x_stride, words, scales, zeros, order, group_of, planes, num_rows, in_size, out_size, num_blocks, split_blocks,
    group_size, tokens, starts, counts, experts, num_tiles, num_groups,
    BITS: tl.constexpr, SLICE: tl.constexpr, RUN: tl.constexpr, IS_WHOLE: tl.constexpr, HAS_ORDER: tl.constexpr,
    IS_EVEN: tl.constexpr, HAS_EXPERTS: tl.constexpr, IS_BY_TOKEN: tl.constexpr,
    IS_TURNED: tl.constexpr, ROWS: tl.constexpr, OUTPUTS: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    flat_output = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    split = tl.program_id(2)
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
    PER_WORD: tl.constexpr = 32 // BITS
    HALF: tl.constexpr = PER_WORD // 2
    FEW: tl.constexpr = RUN if RUN < HALF else HALF
    s = tl.arange(0, SLICE)
    # Tensor cores of Hopper take their left side from registers and their right side from shared memory only: where
    # there are rows enough for them, the weight stands on the left, and the tile is turned.
    if IS_TURNED:
        row, is_row, source = row[None, :], is_row[None, :], source[None, :]
        output, across, along = flat_output[:, None], s[None, :], s[:, None]
        total = tl.zeros((OUTPUTS, ROWS), tl.float32)
    else:
        row, is_row, source = row[:, None], is_row[:, None], source[:, None]
        output, across, along = flat_output[None, :], s[:, None], s[None, :]
        total = tl.zeros((ROWS, OUTPUTS), tl.float32)
    is_output = output < out_size
    first = split * split_blocks
    x_row = x + source.to(tl.int64) * x_stride
    word_cell = words + (first * SLICE + across).to(tl.int64) * out_size + output
    for block in range(first, tl.minimum(first + split_blocks, num_blocks)):
        packed = tl.load(word_cell, mask=is_output, other=0)
        lower = (packed & 0xFFFF) | FLOAT_BITS
        upper = ((packed >> 16) & 0xFFFF) | FLOAT_BITS
        for run in tl.static_range(PER_WORD // RUN):
            if IS_EVEN:
                # The fields of a run are of one group; behind the inputs x is 0, and any group will do.
                group = tl.minimum((block * PER_WORD + run * RUN) * SLICE, in_size - 1) // group_size
                scale = _of_group(scales, group, out_size, flat_output, IS_TURNED)
                zero = _of_group(zeros, group, out_size, flat_output, IS_TURNED)
            for place in tl.static_range(FEW):
                # Fields at one place of their halves are too large by one factor.
                factor = 2.0 ** ((run * RUN + place) % HALF * BITS - FLOAT_PLACE)
                part = tl.zeros_like(total)
                for field in tl.static_range(run * RUN + place, (run + 1) * RUN, HALF):
                    input_place = (block * PER_WORD + field) * SLICE + along
                    is_cell = is_row
                    if not IS_WHOLE:
                        is_cell = is_row & (input_place < in_size)
                    column = input_place
                    if HAS_ORDER:
                        column = tl.load(order + input_place, mask=input_place < in_size, other=0)
                    numbers = tl.load(x_row + column, mask=is_cell, other=0.0)
                    half = lower if field < HALF else upper
                    bits = half & (FLOAT_BITS | (((1 << BITS) - 1) << (field % HALF * BITS)))
                    if not IS_EVEN:
                        groups = tl.load(group_of + (block * PER_WORD + field) * SLICE + across)
                        cell = groups * out_size + output
                        scale = tl.load(scales + cell, mask=is_output, other=0.0).to(tl.float32)
                        zero = tl.load(zeros + cell, mask=is_output, other=0.0).to(tl.float32)
                    weights = (bits.to(tl.float32, bitcast=True) - FLOAT_START) - zero * factor
                    if not IS_EVEN:
                        weights *= scale / factor
                    if IS_TURNED:
                        part = tl.dot(weights.to(numbers.dtype), numbers, part, input_precision="ieee")
                    else:
                        part = tl.dot(numbers, weights.to(numbers.dtype), part, input_precision="ieee")
                total += part * (scale / factor) if IS_EVEN else part
        word_cell += SLICE * out_size
    cell = (row.to(tl.int64) + split.to(tl.int64) * num_rows) * out_size + output
    tl.store(planes + cell, total.to(planes.dtype.element_ty), mask=is_row & is_output)


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


@triton.jit
def _widen(
    words, scales, zeros, order, group_of, wide, first_output, num_outputs, in_size, out_size, group_size,
    BITS: tl.constexpr, SLICE: tl.constexpr, HAS_ORDER: tl.constexpr, IS_EVEN: tl.constexpr, OUTPUTS: tl.constexpr,
):  # fmt: skip
    word = tl.program_id(0)
    column = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    is_column = column < num_outputs
    output = first_output + column
    packed = tl.load(words + word.to(tl.int64) * out_size + output, mask=is_column, other=0)
    for field in tl.static_range(32 // BITS):
        place = (word // SLICE * (32 // BITS) + field) * SLICE + word % SLICE
        if place < in_size:
            group = place // group_size if IS_EVEN else tl.load(group_of + place)
            scale = tl.load(scales + group * out_size + output, mask=is_column, other=0.0).to(tl.float32)
            zero = tl.load(zeros + group * out_size + output, mask=is_column, other=0.0).to(tl.float32)
            number = ((packed >> (field * BITS)) & ((1 << BITS) - 1)).to(tl.float32)
            row = tl.load(order + place) if HAS_ORDER else place
            cell = wide + row.to(tl.int64) * num_outputs + column
            tl.store(cell, ((number - zero) * scale).to(wide.dtype.element_ty), mask=is_column)


def grouped_linear(
    x: Tensor, weight: "PackedGroups", bias: Tensor | None = None, addend: Tensor | None = None,
    num_splits: int | None = None,
) -> Tensor:  # fmt: skip
    num_rows = len(x)
    if num_rows >= MANY_ROWS:
        return _multiply_widened(x, weight, bias, addend)
    rows, outputs = _tile(num_rows)
    num_tiles, has_terms = triton.cdiv(num_rows, rows), bias is not None or addend is not None
    planes = _multiply_splits(x, weight, None, False, num_rows, num_tiles, rows, outputs, num_splits, has_terms)
    return _sum_splits(planes, x, bias, addend)


def grouped_expert_linear(
    x: Tensor, weight: "PackedGroups", tiles: "ExpertTiles", is_by_token: bool, num_splits: int | None = None
) -> Tensor:
    num_rows, rows = len(tiles.tokens), tiles.tile_rows
    outputs = 64 if rows <= 16 else 128
    num_tiles = len(tiles.starts)
    planes = _multiply_splits(x, weight, tiles, is_by_token, num_rows, num_tiles, rows, outputs, num_splits, False)
    return _sum_splits(planes, x, None, None)


def _multiply_splits(
    x: Tensor, weight: "PackedGroups", tiles: "ExpertTiles | None", is_by_token: bool, num_rows: int,
    num_tiles: int, rows: int, outputs: int, num_splits: int | None, has_terms: bool,
) -> Tensor:  # fmt: skip
    """The product's summands [splits, num_rows, out] of programs of so many rows and outputs.

    They are float32; the only one, to which no term is added, is of the type of `x`.
    """
    in_size, out_size = weight.in_size, weight.words.shape[-1]
    if num_rows == 0:
        return x.new_empty(1, 0, out_size)
    num_blocks, block_size = weight.words.shape[-2] // SLICE, SLICE * (32 // weight.bits)
    grid = (num_tiles, triton.cdiv(out_size, outputs))
    if num_splits is None:
        num_splits = max(1, min(MAX_SPLITS, WANTED_PROGRAMS // (grid[0] * grid[1])))
    split_blocks = triton.cdiv(num_blocks, min(num_splits, num_blocks))
    num_splits = triton.cdiv(num_blocks, split_blocks)
    dtype = x.dtype if num_splits == 1 and not has_terms else torch.float32
    planes = torch.empty(num_splits, num_rows, out_size, dtype=dtype, device=x.device)
    is_even = weight.group_of is None
    is_high = rows >= 64
    _multiply[(*grid, num_splits)](
        x, x.stride(0), weight.words, weight.scales, weight.zeros, *_places(weight),
        planes, num_rows, in_size, out_size, num_blocks, split_blocks, weight.group_size,
        *((x, x, x, x, x) if tiles is None else _tile_arguments(tiles)), weight.scales.shape[-2],
        BITS=weight.bits, SLICE=SLICE, RUN=math.gcd(weight.group_size // SLICE, 32 // weight.bits) if is_even else 1,
        IS_WHOLE=in_size % block_size == 0, HAS_ORDER=weight.order is not None, IS_EVEN=is_even,
        HAS_EXPERTS=tiles is not None, IS_BY_TOKEN=is_by_token, IS_TURNED=is_high, ROWS=rows, OUTPUTS=outputs,
        num_warps=8 if is_high else 4, num_stages=3 if is_high else 6,
    )  # fmt: skip
    return planes


def _multiply_widened(x: Tensor, weight: "PackedGroups", bias: Tensor | None, addend: Tensor | None) -> Tensor:
    """As `grouped_linear`, a part of the outputs after the other."""
    num_words, out_size = weight.words.shape
    out = x.new_empty(len(x), out_size)
    width = max(16, WIDE_BYTES // (weight.in_size * x.itemsize) // 16 * 16)
    for first in range(0, out_size, width):
        columns = slice(first, min(first + width, out_size))
        wide = x.new_empty(weight.in_size, columns.stop - first)
        _widen[(num_words, triton.cdiv(wide.shape[1], WIDE_OUTPUTS))](
            weight.words, weight.scales, weight.zeros, *_places(weight), wide, first, wide.shape[1],
            weight.in_size, out_size, weight.group_size,
            BITS=weight.bits, SLICE=SLICE, HAS_ORDER=weight.order is not None, IS_EVEN=weight.group_of is None,
            OUTPUTS=WIDE_OUTPUTS,
        )  # fmt: skip
        if addend is not None:
            torch.addmm(addend[:, columns], x, wide, out=out[:, columns])
        else:
            torch.mm(x, wide, out=out[:, columns])
    if bias is not None:
        out += bias
    return out


def _places(weight: "PackedGroups") -> tuple[Tensor, Tensor]:
    """Which input stands at each place, and of which group it is; where that needs no table, what nobody reads."""
    words = weight.words
    return words if weight.order is None else weight.order, words if weight.group_of is None else weight.group_of


def _tile_arguments(tiles: "ExpertTiles") -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return tiles.tokens, tiles.starts, tiles.counts, tiles.experts, tiles.num_tiles


def _sum_splits(planes: Tensor, x: Tensor, bias: Tensor | None, addend: Tensor | None) -> Tensor:
    num_splits, num_rows, out_size = planes.shape
    if num_rows == 0 or (num_splits == 1 and planes.dtype == x.dtype and bias is None and addend is None):
        return planes[0]
    out = x.new_empty(num_rows, out_size)
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
