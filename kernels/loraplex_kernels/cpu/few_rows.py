"""The product of a few rows with a weight in oneDNN's blocked layout, as fast as memory gives the weight.

At a few rows a linear layer is the reading of its weight. oneDNN's own product spends some 10 us a call beside that,
and shares its work between the threads beforehand, so that it waits for whichever was interrupted. This one reads the
same copy of the weight, in blocks that the threads take as they come to them, and adds the adapters' deltas to a
block's sums while they are at hand. Each row's sums are taken in the same order whatever other rows are in the batch.

The layout, [out / 64, in / 2, 64, 2]: for 64 outputs and two neighbouring inputs their 128 numbers lie together, so
that a vector of 16 outputs is one load for both inputs, and no sum crosses a vector.
"""

import struct
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from torch import Tensor

from loraplex_kernels.cpu.atomics import add
from loraplex_kernels.cpu.compiled import floats, halves, ints, jit, load, longs, store
from loraplex_kernels.cpu.team import ChunkFunction, process_team, wait_for_zero

if TYPE_CHECKING:
    from loraplex_kernels.lora import LoraSegments, LoraTable

BLOCK = 64  # outputs
_LANES = 16
_VECTORS = BLOCK // _LANES
_REGISTERS = 16  # that running sums may take: half of what there is
# Ranks of one adapter that one thread computes, and about how many chunks the outputs are taken in.
RANKS_A_TASK = 16
_CHUNKS = 64
# How far ahead memory is asked for, 2 KiB: the processor's own prefetching stops at the end of each page.
_VECTORS_AHEAD = 32


class _BFloatType(ir.Type):
    """bfloat16 as LLVM writes it; llvmlite has no word for it."""

    def _to_string(self):
        return "bfloat"

    def __eq__(self, other):
        return isinstance(other, _BFloatType)

    def __hash__(self):
        return hash(_BFloatType)


_i32, _i64, _byte_pointer = ir.IntType(32), ir.IntType(64), ir.PointerType(ir.IntType(8))
_ints, _floats = ir.VectorType(_i32, _LANES), ir.VectorType(ir.FloatType(), _LANES)
_halves = ir.VectorType(_BFloatType(), 2 * _LANES)


def is_served(processor_features: Mapping[str, bool]) -> bool:
    """Whether a processor with these features (of llvmlite) has the instruction that the sums are made of."""
    return bool(processor_features.get("avx512bf16"))


def _sums_of(num_rows):
    """Compiled code for the sums of `num_rows` rows over one block: loops whose running sums stay in registers."""

    @intrinsic
    def sums(typing_context, x, row_bytes, block, num_pairs, out):
        def generate(context, builder, signature, arguments):
            together = min(_VECTORS, _REGISTERS // num_rows)
            for first in range(0, _VECTORS, together):
                _generate_loop(builder, num_rows, range(first, first + together), *arguments)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 5), generate

    return sums


def _generate_loop(builder, num_rows, vectors, x, row_bytes, block, num_pairs, out):
    """x: address of [rows, in] bfloat16; block: that of [in / 2, 64, 2]; out: that of [rows, 64] float32."""

    def constant(number):
        return ir.Constant(_i64, number)

    def function(name, result, *arguments):
        return cgutils.get_or_insert_function(builder.module, ir.FunctionType(result, arguments), name)

    add_products = function("llvm.x86.avx512bf16.dpbf16ps.512", _floats, _floats, _halves, _halves)
    prefetch = function("llvm.prefetch.p0", ir.VoidType(), _byte_pointer, _i32, _i32, _i32)
    to_read_data_soon = [ir.Constant(_i32, number) for number in (0, 3, 1)]
    nothing, everywhere = ir.Constant(_ints, ir.Undefined), ir.Constant(_ints, [0] * _LANES)

    before = builder.block
    loop, after = builder.append_basic_block("pairs"), builder.append_basic_block("done")
    builder.branch(loop)
    builder.position_at_end(loop)
    pair = builder.phi(_i64)
    pair.add_incoming(constant(0), before)
    sums = [[builder.phi(_floats) for _ in vectors] for _ in range(num_rows)]
    inputs = []
    for row in range(num_rows):
        address = builder.add(builder.add(x, builder.mul(row_bytes, constant(row))), builder.mul(pair, constant(4)))
        both = builder.load(builder.inttoptr(address, ir.PointerType(_i32)), align=2)
        first_lane = builder.insert_element(nothing, both, ir.Constant(_i32, 0))
        inputs.append(builder.bitcast(builder.shuffle_vector(first_lane, nothing, everywhere), _halves))
    weights = builder.inttoptr(builder.add(block, builder.mul(pair, constant(4 * BLOCK))), ir.PointerType(_ints))
    totals = [[] for _ in range(num_rows)]
    for place, vector in enumerate(vectors):
        later = builder.gep(weights, [constant(vector + _VECTORS_AHEAD)])
        builder.call(prefetch, [builder.bitcast(later, _byte_pointer), *to_read_data_soon])
        weight = builder.bitcast(builder.load(builder.gep(weights, [constant(vector)]), align=64), _halves)
        for row in range(num_rows):
            totals[row].append(builder.call(add_products, [sums[row][place], weight, inputs[row]]))
    following = builder.add(pair, constant(1))
    pair.add_incoming(following, loop)
    for row in range(num_rows):
        for running, total in zip(sums[row], totals[row], strict=True):
            running.add_incoming(ir.Constant(_floats, [0.0] * _LANES), before)
            running.add_incoming(total, loop)
    builder.cbranch(builder.icmp_signed("<", following, num_pairs), loop, after)
    builder.position_at_end(after)
    for row in range(num_rows):
        line = builder.inttoptr(builder.add(out, constant(4 * BLOCK * row)), ir.PointerType(_floats))
        for vector, total in zip(vectors, totals[row], strict=True):
            builder.store(total, builder.gep(line, [constant(vector)]), align=4)


_sums_1, _sums_2, _sums_4, _sums_8 = (_sums_of(number) for number in (1, 2, 4, 8))


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
    arguments = longs(numbers, 21)
    x, weight, bias, addend, out = arguments[0], arguments[1], arguments[2], arguments[3], arguments[4]
    num_rows, in_size, out_size = arguments[5], arguments[6], arguments[7]
    chunk_size, num_blocks, num_chunks = arguments[8], arguments[9], arguments[10]
    first_word, num_parts, num_segments, max_rank = arguments[11], arguments[12], arguments[13], arguments[14]
    has_adapters = num_segments > 0
    table = longs(arguments[15], (arguments[16], num_parts, 3))
    starts, slots = ints(arguments[17], num_segments + 1), ints(arguments[18], num_segments)
    columns, h = longs(arguments[19], num_parts + 1), floats(arguments[20], (num_rows, num_parts * max_rank))
    if chunk >= num_chunks:
        _shrink(x, num_rows, in_size, table, starts, slots, max_rank, chunk - num_chunks, h)
        add(first_word, -1)
        return
    result = halves(out, (num_rows, out_size))
    sums = np.empty((8, BLOCK), np.float32)
    row_bytes, num_pairs = 2 * in_size, in_size // 2
    for block in range(chunk * chunk_size, min((chunk + 1) * chunk_size, num_blocks)):
        weights = weight + block * BLOCK * row_bytes
        column = block * BLOCK
        first_row = 0
        while first_row < num_rows:
            remaining = num_rows - first_row
            rows = x + first_row * row_bytes
            if remaining >= 8:
                together = 8
                _sums_8(rows, row_bytes, weights, num_pairs, sums.ctypes.data)
            elif remaining >= 4:
                together = 4
                _sums_4(rows, row_bytes, weights, num_pairs, sums.ctypes.data)
            elif remaining >= 2:
                together = 2
                _sums_2(rows, row_bytes, weights, num_pairs, sums.ctypes.data)
            else:
                together = 1
                _sums_1(rows, row_bytes, weights, num_pairs, sums.ctypes.data)
            if has_adapters:
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
                line = result[token, column : column + BLOCK]
                for i in range(BLOCK):
                    line[i] = store(sums[row, i], line[i])
            first_row += together


_LAYOUT = struct.Struct("22q")
_NO_ADAPTERS = (0,) * 9


def product(
    x: Tensor,
    address: int,
    out_size: int,
    bias: Tensor | None,
    addend: Tensor | None,
    table: "LoraTable | None" = None,
    segments: "LoraSegments | None" = None,
) -> Tensor:
    """Return x @ weight.T + bias + addend, plus each token's adapter delta: [T, out_size], rounded once.

    x: [T, in], addend: [T, out_size], bias: [out_size], all bfloat16; address: that of the weight's first block. The
    table is one of compiled loops, and with it come segments.
    """
    x = x.contiguous()
    addend = None if addend is None else addend.contiguous()
    num_rows, in_size = x.shape
    out = x.new_empty(num_rows, out_size)
    num_blocks = out_size // BLOCK
    chunk_size = max(num_blocks // _CHUNKS, 1)
    num_chunks = -(-num_blocks // chunk_size)
    team = process_team()
    num_tasks, adapters = 0, _NO_ADAPTERS
    if table is not None and segments is not None:
        max_rank, num_parts = table.max_rank, table.num_parts
        h = torch.empty(num_rows * num_parts * max_rank, dtype=torch.float32)
        num_tasks = segments.count * num_parts * -(-max_rank // RANKS_A_TASK)
        adapters = (
            num_parts, segments.count, max_rank, table.address, table.num_slots, segments.starts_address,
            segments.slots_address, table.columns_address, h.data_ptr(),
        )  # fmt: skip
    team.run(
        _LAYOUT, num_chunks + num_tasks, _product_chunk.address, x.data_ptr(), address,
        0 if bias is None else bias.data_ptr(), 0 if addend is None else addend.data_ptr(), out.data_ptr(),
        num_rows, in_size, out_size, chunk_size, num_blocks, num_chunks, team.first_word, *adapters,
        num_first=num_tasks,
    )  # fmt: skip
    return out
