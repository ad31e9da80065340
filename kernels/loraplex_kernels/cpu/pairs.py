"""Products of two neighbouring inputs with their weights: one instruction where the processor multiplies bfloat16.

Both forms add the same exact products to sums in float32; what a value is before that is the form's own business.
"""

import numba
from llvmlite import ir
from numba.core.codegen import get_host_cpu_features

from loraplex_kernels.cpu.emit import LANES, Emit, floats, i16, ints

INT4_ZERO = 8


class _BFloatType(ir.Type):
    """bfloat16 as LLVM writes it; llvmlite has no word for it."""

    def _to_string(self):
        return "bfloat"

    def __eq__(self, other):
        return isinstance(other, _BFloatType)

    def __hash__(self):
        return hash(_BFloatType)


_halves, _shorts = ir.VectorType(_BFloatType(), 2 * LANES), ir.VectorType(i16, 2 * LANES)
# The bits of number - 8 in bfloat16; twice, since an index counts to 31 and its fifth bit belongs to something else.
_INT4_HALVES = (
    0xC100, 0xC0E0, 0xC0C0, 0xC0A0, 0xC080, 0xC040, 0xC000, 0xBF80,
    0x0000, 0x3F80, 0x4000, 0x4040, 0x4080, 0x40A0, 0x40C0, 0x40E0,
) * 2  # fmt: skip


def _floats_of_int8(builder, numbers):
    return builder.sitofp(builder.sext(numbers, ints), floats)


class HalfPairs:
    """Pairs stay bfloat16, side by side in 32 bits."""

    def __init__(self, emit: Emit):
        self._emit = emit

    def of_halves(self, both):
        """Pairs of bfloat16 in 32 bits each."""
        return self._emit.builder.bitcast(both, _halves)

    def of_int4(self, both):
        """Pairs of 4 bits in the lowest 8 of 32 bits each, less 8."""
        builder = self._emit.builder
        # The first number is the index of the lower 16 bits as it stands, the second comes to that of the upper ones.
        spread = builder.or_(both, builder.shl(both, self._emit.every(12)))
        table = ir.Constant(_shorts, list(_INT4_HALVES))
        found = self._emit.call("llvm.x86.avx512.permvar.hi.512", _shorts, table, builder.bitcast(spread, _shorts))
        return builder.bitcast(found, _halves)

    def of_int8(self, first, second):
        """Pairs of numbers of 8 bits, the first ones and the second ones."""
        builder = self._emit.builder
        # Eight bits are exact in bfloat16, so that the lower halves of the float32 numbers are zeros.
        lower, upper = (builder.bitcast(_floats_of_int8(builder, numbers), ints) for numbers in (first, second))
        return builder.bitcast(builder.or_(builder.lshr(lower, self._emit.every(16)), upper), _halves)

    def add(self, total, weights, inputs):
        """total + the products of both."""
        return self._emit.call("llvm.x86.avx512bf16.dpbf16ps.512", floats, total, weights, inputs)


class FloatPairs:
    """Pairs become two vectors of float32."""

    def __init__(self, emit: Emit):
        self._emit = emit

    def of_halves(self, both):
        """Pairs of bfloat16 in 32 bits each."""
        return self._emit.first_and_second(both)

    def of_int4(self, both):
        """Pairs of 4 bits in the lowest 8 of 32 bits each, less 8."""
        builder, zero = self._emit.builder, self._emit.every(INT4_ZERO)
        numbers = builder.and_(both, self._emit.every(15)), builder.lshr(both, self._emit.every(4))
        return tuple(builder.sitofp(builder.sub(number, zero), floats) for number in numbers)

    def of_int8(self, first, second):
        """Pairs of numbers of 8 bits, the first ones and the second ones."""
        return tuple(_floats_of_int8(self._emit.builder, numbers) for numbers in (first, second))

    def add(self, total, weights, inputs):
        """total + the products of both."""
        for weight, number in zip(weights, inputs, strict=True):
            total = self._emit.multiply_add(weight, number, total)
        return total


def multiplies_halves() -> bool:
    """Whether the processor that numba compiles for has products of bfloat16."""
    chosen = numba.config.CPU_FEATURES  # type: ignore[attr-defined]  # numba sets it while it is imported
    return "+avx512bf16" in (get_host_cpu_features() if chosen is None else chosen)


def best_pairs():
    """The form for this processor."""
    return HalfPairs if multiplies_halves() else FloatPairs
