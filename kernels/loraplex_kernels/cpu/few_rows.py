"""The product of a few rows with a weight in blocks, as fast as memory gives the weight.

At a few rows a linear layer is the reading of its weight. oneDNN's own product spends some 10 us a call beside that,
and shares its work between the threads beforehand, so that it waits for whichever was interrupted. This one takes the
weight (in oneDNN's layout or one for whole numbers, see `block_sums`) in blocks, which the threads take as they come to
them, and adds the adapters' deltas to a block's sums while they are at hand. Each row's sums are taken in the same
order whatever other rows are in the batch.
"""

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from loraplex_kernels.cpu.atomics import add
from loraplex_kernels.cpu.block_sums import BLOCK, half_sums_of, int4_sums_of, int8_sums_of
from loraplex_kernels.cpu.compiled import floats, halves, inline, ints, jit, load, longs, store
from loraplex_kernels.cpu.team import ChunkFunction, process_team, wait_for_zero

if TYPE_CHECKING:
    from loraplex_kernels.lora import Deltas

HALF, INT8, INT4 = 0, 1, 2  # kinds of weights
# Ranks of one adapter that one thread computes, and about how many chunks the outputs are taken in.
RANKS_A_TASK = 16
_CHUNKS = 64

_half_1, _half_2, _half_4, _half_8 = (half_sums_of(number) for number in (1, 2, 4, 8))
_int8_1, _int8_2, _int8_4, _int8_8 = (int8_sums_of(number) for number in (1, 2, 4, 8))
_int4_1, _int4_2, _int4_4, _int4_8 = (int4_sums_of(number) for number in (1, 2, 4, 8))


@dataclass(frozen=True, slots=True)
class BlockedWeight:
    """Where a weight [out_size, in_size] of some kind lies. `scales` and `group_size`: as `block_sums` says; else 0."""

    kind: int
    address: int
    out_size: int
    in_size: int
    scales: int = 0
    group_size: int = 0


@inline
def _half_sums(together, x, in_size, block, out):
    if together == 8:
        _half_8(x, 2 * in_size, block, in_size // 2, out)
    elif together == 4:
        _half_4(x, 2 * in_size, block, in_size // 2, out)
    elif together == 2:
        _half_2(x, 2 * in_size, block, in_size // 2, out)
    else:
        _half_1(x, 2 * in_size, block, in_size // 2, out)


@inline
def _int8_sums(together, x, in_size, block, scales, out):
    if together == 8:
        _int8_8(x, 2 * in_size, block, in_size // 2, scales, out)
    elif together == 4:
        _int8_4(x, 2 * in_size, block, in_size // 2, scales, out)
    elif together == 2:
        _int8_2(x, 2 * in_size, block, in_size // 2, scales, out)
    else:
        _int8_1(x, 2 * in_size, block, in_size // 2, scales, out)


@inline
def _int4_sums(together, x, in_size, block, group_size, groups, out_size, input_sums, out):
    num_groups, pairs, group_bytes = in_size // group_size, group_size // 2, 4 * out_size
    if together == 8:
        _int4_8(x, 2 * in_size, block, num_groups, pairs, groups, group_bytes, input_sums, out)
    elif together == 4:
        _int4_4(x, 2 * in_size, block, num_groups, pairs, groups, group_bytes, input_sums, out)
    elif together == 2:
        _int4_2(x, 2 * in_size, block, num_groups, pairs, groups, group_bytes, input_sums, out)
    else:
        _int4_1(x, 2 * in_size, block, num_groups, pairs, groups, group_bytes, input_sums, out)


@jit
def _sum_groups(x, num_rows, num_groups, group_size, sums):
    """The sum of each row's inputs in each group."""
    inputs, totals = halves(x, (num_rows, num_groups, group_size)), floats(sums, (num_rows, num_groups))
    for row in range(num_rows):
        for group in range(num_groups):
            total = np.float32(0)
            for i in range(group_size):
                total += load(inputs[row, group, i])
            totals[row, group] = total


@jit
def _shrink(x, num_rows, in_size, table, starts, slots, max_rank, task, h):
    """A task's part of h = x @ A.T: one segment, one part of the layer, RANKS_A_TASK ranks."""
    num_parts, num_groups = table.shape[1], (max_rank + RANKS_A_TASK - 1) // RANKS_A_TASK
    segment, part, first = task // (num_parts * num_groups), task // num_groups % num_parts, task % num_groups
    slot = slots[segment]
    if slot < 0:
        return
    rank = table[slot, part, 2]
    inputs = halves(x, (num_rows, in_size))
    a = halves(table[slot, part, 0], (rank, in_size))
    for row in range(first * RANKS_A_TASK, min((first + 1) * RANKS_A_TASK, rank)):
        for token in range(starts[segment], starts[segment + 1]):
            total = np.float32(0)
            for i in range(in_size):
                total += load(inputs[token, i]) * load(a[row, i])
            h[token, part * max_rank + row] = total


@jit
def _expand(h, table, slot, columns, max_rank, token, column, sums):
    """Add a token's delta to its sums of one block, the outputs from `column` on."""
    for part in range(table.shape[1]):
        first, end = max(columns[part], column), min(columns[part + 1], column + BLOCK)
        rank = table[slot, part, 2]
        if first >= end or rank == 0:
            continue
        size = columns[part + 1] - columns[part]
        b = halves(table[slot, part, 1], (rank, size))[:, first - columns[part] : end - columns[part]]
        line = sums[first - column : end - column]
        weights = h[token, part * max_rank : part * max_rank + rank]
        # Four rows at a time: the running sums are read and written a quarter as often.
        for row in range(0, rank - 3, 4):
            w0, w1, w2, w3 = weights[row], weights[row + 1], weights[row + 2], weights[row + 3]
            for i in range(end - first):
                line[i] += (w0 * load(b[row, i]) + w1 * load(b[row + 1, i])) + (
                    w2 * load(b[row + 2, i]) + w3 * load(b[row + 3, i])
                )
        for row in range(rank - rank % 4, rank):
            weight = weights[row]
            for i in range(end - first):
                line[i] += weight * load(b[row, i])


@ChunkFunction
def _product_chunk(numbers, chunk):
    """Some blocks of the product; or, for the highest chunks, a task of the adapters' shrinking."""
    arguments = longs(numbers, 26)
    x, weight, bias, addend, out = arguments[0], arguments[1], arguments[2], arguments[3], arguments[4]
    num_rows, in_size, out_size = arguments[5], arguments[6], arguments[7]
    chunk_size, num_blocks, num_chunks = arguments[8], arguments[9], arguments[10]
    kind, all_sums, scales, group_size = arguments[11], arguments[12], arguments[13], arguments[14]
    first_word, num_parts, num_segments, max_rank = arguments[15], arguments[16], arguments[17], arguments[18]
    table = longs(arguments[19], (arguments[20], num_parts, 3))
    starts, slots = ints(arguments[21], num_segments + 1), ints(arguments[22], num_segments)
    columns, h = longs(arguments[23], num_parts + 1), floats(arguments[24], (num_rows, num_parts * max_rank))
    is_wide = arguments[25]
    if chunk >= num_chunks:
        _shrink(x, num_rows, in_size, table, starts, slots, max_rank, chunk - num_chunks, h)
        add(first_word, -1)
        return
    result, wide_result = halves(out, (num_rows, out_size)), floats(out, (num_rows, out_size))
    sums = np.empty((8, BLOCK), np.float32)
    for block in range(chunk * chunk_size, min((chunk + 1) * chunk_size, num_blocks)):
        column = block * BLOCK
        first_row = 0
        while first_row < num_rows:
            remaining = num_rows - first_row
            together = 8 if remaining >= 8 else 4 if remaining >= 4 else 2 if remaining >= 2 else 1
            if kind == HALF:
                rows, weights = x + 2 * first_row * in_size, weight + 2 * column * in_size
                _half_sums(together, rows, in_size, weights, sums.ctypes.data)
            elif kind == INT8:
                rows, weights = x + 2 * first_row * in_size, weight + column * in_size
                _int8_sums(together, rows, in_size, weights, scales + 4 * column, sums.ctypes.data)
            else:
                rows, weights = x + 2 * first_row * in_size, weight + column * in_size // 2
                groups, input_sums = scales + 4 * column, all_sums + 4 * first_row * (in_size // group_size)
                _int4_sums(together, rows, in_size, weights, group_size, groups, out_size, input_sums, sums.ctypes.data)
            if num_segments > 0:
                wait_for_zero(first_word)
            for row in range(together):
                token = first_row + row
                if bias != 0:
                    biases = halves(bias, out_size)[column : column + BLOCK]
                    for i in range(BLOCK):
                        sums[row, i] += load(biases[i])
                if addend != 0:
                    addends = halves(addend, (num_rows, out_size))[token, column : column + BLOCK]
                    for i in range(BLOCK):
                        sums[row, i] += load(addends[i])
                for segment in range(num_segments):
                    if starts[segment] <= token < starts[segment + 1] and slots[segment] >= 0:
                        _expand(h, table, slots[segment], columns, max_rank, token, column, sums[row])
                if is_wide:
                    wide_result[token, column : column + BLOCK] = sums[row]
                    continue
                line = result[token, column : column + BLOCK]
                for i in range(BLOCK):
                    line[i] = store(sums[row, i], line[i])
            first_row += together


_LAYOUT = struct.Struct("27q")
_NO_ADAPTERS = (0,) * 9


def product(
    x: Tensor,
    weight: BlockedWeight,
    bias: Tensor | None = None,
    addend: Tensor | None = None,
    deltas: "Deltas | None" = None,
    *,
    is_wide: bool = False,
) -> Tensor:
    """Return x @ weight.T + bias + addend, plus each token's adapter delta: [T, out_size], rounded once.

    x: [T, in], addend: [T, out_size], bias: [out_size], all bfloat16; the deltas' table is one of compiled loops. With
    `is_wide` the result is the float32 sums as they are.
    """
    x = x.contiguous()
    addend = None if addend is None else addend.contiguous()
    num_rows, out_size = len(x), weight.out_size
    input_sums = _input_sums(x, weight)
    out = x.new_empty(num_rows, out_size, dtype=torch.float32 if is_wide else x.dtype)
    num_blocks = out_size // BLOCK
    chunk_size = max(num_blocks // _CHUNKS, 1)
    num_chunks = -(-num_blocks // chunk_size)
    team = process_team()
    num_tasks, adapters = 0, _NO_ADAPTERS
    if deltas is not None:
        table, segments = deltas
        max_rank, num_parts = table.max_rank, table.num_parts
        h = torch.empty(num_rows * num_parts * max_rank, dtype=torch.float32)
        num_tasks = segments.count * num_parts * -(-max_rank // RANKS_A_TASK)
        adapters = (
            num_parts, segments.count, max_rank, table.address, table.num_slots, segments.starts_address,
            segments.slots_address, table.columns_address, h.data_ptr(),
        )  # fmt: skip
    team.run(
        _LAYOUT, num_chunks + num_tasks, _product_chunk.address, x.data_ptr(), weight.address,
        0 if bias is None else bias.data_ptr(), 0 if addend is None else addend.data_ptr(), out.data_ptr(),
        num_rows, weight.in_size, out_size, chunk_size, num_blocks, num_chunks, weight.kind,
        0 if input_sums is None else input_sums.data_ptr(), weight.scales, weight.group_size, team.first_word,
        *adapters, is_wide, num_first=num_tasks,
    )  # fmt: skip
    return out


def _input_sums(x: Tensor, weight: BlockedWeight) -> Tensor | None:
    """The sums of the inputs of each row and group [T, groups], for a weight with offsets."""
    if weight.kind != INT4:
        return None
    num_groups = weight.in_size // weight.group_size
    sums = torch.empty(len(x), num_groups)
    _sum_groups(x.data_ptr(), len(x), num_groups, weight.group_size, sums.data_ptr())
    return sums
