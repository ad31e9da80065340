"""The sums of a few rows of inputs over one block of 64 outputs, for each way in which weights are kept.

Layouts of a block, inputs before outputs, so that a vector of 16 outputs is one load and no sum crosses a vector:
bfloat16 [in / 2, 64, 2] as oneDNN has it; 8 bits [in, 64] with a scale for each output; 4 bits [in / 2, 64], the first
of two inputs in the lower half, with a scale and an offset for each output and group of inputs.

The running sums stay in registers, for which the number of rows is fixed: `sums_1`, `sums_2` and so on.
"""

from numba import types
from numba.extending import intrinsic

from loraplex_kernels.cpu.emit import LANES, NO_FLOATS, Emit, f32, floats, i32, ints, octets
from loraplex_kernels.cpu.pairs import best_pairs

BLOCK = 64  # outputs
_VECTORS = BLOCK // LANES
_REGISTERS = 16  # that running sums may take: half of what there is


def _runs(num_rows):
    """The vectors of a block, so many at a time as the registers hold sums for."""
    together = max(1, min(_VECTORS, _REGISTERS // num_rows))
    return [range(first, first + together) for first in range(0, _VECTORS, together)]


def _store(emit, sums, num_rows, vectors, out):
    for row in range(num_rows):
        for place, vector in enumerate(vectors):
            emit.store(sums[row * len(vectors) + place], emit.address(out, (4 * BLOCK, row), (4 * LANES, vector)))


def half_sums_of(num_rows, pairs_of=None):
    """bfloat16: x [rows, in] bfloat16; out [rows, 64] float32."""

    @intrinsic
    def sums(typing_context, x, row_bytes, block, num_pairs, out):
        def generate(context, builder, signature, arguments):
            emit = Emit(builder)
            for vectors in _runs(num_rows):
                _emit_half_sums(emit, (pairs_of or best_pairs())(emit), num_rows, vectors, *arguments)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 5), generate

    return sums


def _input_pairs(emit, pairs, num_rows, x, row_bytes, place):
    """Two neighbouring inputs of each row, in all lanes."""
    return [
        pairs.of_halves(emit.spread(emit.load(i32, emit.address(x, (row_bytes, row), (place, 4)), align=2), ints))
        for row in range(num_rows)
    ]


def _emit_half_sums(emit, pairs, num_rows, vectors, x, row_bytes, block, num_pairs, out):
    def add_pair(pair, sums):
        inputs = _input_pairs(emit, pairs, num_rows, x, row_bytes, pair)
        weights = emit.address(block, (pair, 4 * BLOCK))
        totals = list(sums)
        for place, vector in enumerate(vectors):
            address = emit.address(weights, (4 * LANES, vector))
            emit.fetch_ahead(address)
            weight = pairs.of_halves(emit.load(ints, address, align=64))
            for row in range(num_rows):
                which = row * len(vectors) + place
                totals[which] = pairs.add(sums[which], weight, inputs[row])
        return totals

    _store(emit, emit.loop(num_pairs, [NO_FLOATS] * num_rows * len(vectors), add_pair), num_rows, vectors, out)


def int8_sums_of(num_rows, pairs_of=None):
    """8 bits: x [rows, in] bfloat16; scales [64] float32; out [rows, 64] float32."""

    @intrinsic
    def sums(typing_context, x, row_bytes, block, num_pairs, scales, out):
        def generate(context, builder, signature, arguments):
            emit = Emit(builder)
            for vectors in _runs(num_rows):
                _emit_int8_sums(emit, (pairs_of or best_pairs())(emit), num_rows, vectors, *arguments)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 6), generate

    return sums


def _emit_int8_sums(emit, pairs, num_rows, vectors, x, row_bytes, block, num_pairs, scales, out):
    builder = emit.builder

    def add_pair(pair, sums):
        inputs = _input_pairs(emit, pairs, num_rows, x, row_bytes, pair)
        lines = [emit.address(block, (pair, 2 * BLOCK), (BLOCK, which)) for which in (0, 1)]
        for line in lines:
            emit.fetch_ahead(line)
        totals = list(sums)
        for at, vector in enumerate(vectors):
            numbers = [emit.load(octets, emit.address(line, (LANES, vector)), align=16) for line in lines]
            weight = pairs.of_int8(*numbers)
            for row in range(num_rows):
                which = row * len(vectors) + at
                totals[which] = pairs.add(sums[which], weight, inputs[row])
        return totals

    sums = emit.loop(num_pairs, [NO_FLOATS] * num_rows * len(vectors), add_pair)
    for at, vector in enumerate(vectors):
        scale = emit.load(floats, emit.address(scales, (4 * LANES, vector)), align=4)
        for row in range(num_rows):
            which = row * len(vectors) + at
            sums[which] = builder.fmul(sums[which], scale)
    _store(emit, sums, num_rows, vectors, out)


def int4_sums_of(num_rows, pairs_of=None):
    """4 bits: x [rows, in] bfloat16; input_sums [rows, groups] float32: of each group's inputs.

    groups: of the block's first output in [in / group, out, 2] bfloat16.
    """

    @intrinsic
    def sums(
        typing_context, x, row_bytes, block, num_groups, group_pairs, groups, group_bytes, input_sums, out
    ):  # fmt: skip
        def generate(context, builder, signature, arguments):
            emit = Emit(builder)
            for vectors in _runs(num_rows):
                _emit_int4_sums(emit, (pairs_of or best_pairs())(emit), num_rows, vectors, *arguments)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 9), generate

    return sums


def _emit_int4_sums(
    emit, pairs, num_rows, vectors, x, row_bytes, block, num_groups, group_pairs, groups, group_bytes, input_sums, out
):  # fmt: skip
    builder = emit.builder
    num_sums = num_rows * len(vectors)

    def add_pair(pair, sums):
        inputs = _input_pairs(emit, pairs, num_rows, x, row_bytes, pair)
        weights = emit.address(block, (pair, BLOCK))
        emit.fetch_ahead(weights)
        totals = list(sums)
        for at, vector in enumerate(vectors):
            numbers = emit.load(octets, emit.address(weights, (LANES, vector)), align=16)
            weight = pairs.of_int4(builder.zext(numbers, ints))
            for row in range(num_rows):
                which = row * len(vectors) + at
                totals[which] = pairs.add(sums[which], weight, inputs[row])
        return totals

    def add_group(group, totals):
        first_pair = builder.mul(group, group_pairs)
        sums = emit.loop(
            group_pairs, [NO_FLOATS] * num_sums, lambda pair, sums: add_pair(builder.add(first_pair, pair), sums)
        )
        sum_bytes = builder.mul(num_groups, emit.word(4))
        following = list(totals)
        for row in range(num_rows):
            sum_address = emit.address(input_sums, (sum_bytes, row), (group, 4))
            input_sum = emit.spread(emit.load(f32, sum_address, align=4), floats)
            for at, vector in enumerate(vectors):
                pair = emit.load(ints, emit.address(groups, (group, group_bytes), (4 * LANES, vector)), align=4)
                scale, offset = emit.first_and_second(pair)
                which = row * len(vectors) + at
                total = emit.multiply_add(sums[which], scale, totals[which])
                following[which] = emit.multiply_add(input_sum, offset, total)
        return following

    _store(emit, emit.loop(num_groups, [NO_FLOATS] * num_sums, add_group), num_rows, vectors, out)
