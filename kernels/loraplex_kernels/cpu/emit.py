"""Vector code for numba's functions: what their loops are too plain to say, written as LLVM's instructions.

Values are 16 lanes wide, of which a processor with shorter vectors takes several. Addresses are int64.
"""

from llvmlite import ir
from numba.core import cgutils

LANES = 16
# How far ahead memory is asked for, 2 KiB: the processor's own prefetching stops at the end of each page.
BYTES_AHEAD = 2048

i8, i16, i32, i64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
f32 = ir.FloatType()
octets, ints, floats = ir.VectorType(i8, LANES), ir.VectorType(i32, LANES), ir.VectorType(f32, LANES)
NO_FLOATS = ir.Constant(floats, [0.0] * LANES)


class Emit:
    """Instructions at the end of a function under construction."""

    def __init__(self, builder):
        self.builder = builder

    def word(self, number):
        """A constant of 64 bits."""
        return ir.Constant(i64, number)

    def every(self, number):
        """A constant of 32 bits in all lanes."""
        return ir.Constant(ints, [number] * LANES)

    def address(self, base, *steps):
        """base + the product of each step's factors, in bytes; a factor may be a plain number."""
        for first, second in steps:
            factors = [self.word(f) if isinstance(f, int) else f for f in (first, second)]
            base = self.builder.add(base, self.builder.mul(*factors))
        return base

    def load(self, kind, address, align):
        """The value at an address."""
        return self.builder.load(self.builder.inttoptr(address, ir.PointerType(kind)), align=align)

    def store(self, value, address):
        """Put a vector of float32 at an address."""
        self.builder.store(value, self.builder.inttoptr(address, ir.PointerType(floats)), align=4)

    def spread(self, value, kind):
        """One value in all lanes of a vector type."""
        nothing, everywhere = ir.Constant(kind, ir.Undefined), ir.Constant(ints, [0] * LANES)
        lane = self.builder.insert_element(nothing, value, ir.Constant(i32, 0))
        return self.builder.shuffle_vector(lane, nothing, everywhere)

    def call(self, name, result, *arguments):
        """Call one of LLVM's functions."""
        function_type = ir.FunctionType(result, [argument.type for argument in arguments])
        return self.builder.call(cgutils.get_or_insert_function(self.builder.module, function_type, name), arguments)

    def multiply_add(self, x, y, z):
        """x * y + z of float32 lanes, rounded once."""
        return self.call(f"llvm.fma.v{LANES}f32", floats, x, y, z)

    def fetch_ahead(self, address):
        """Ask for the memory that comes some time after an address."""
        later = self.builder.inttoptr(self.address(address, (BYTES_AHEAD, 1)), ir.PointerType(i8))
        kind = [ir.Constant(i32, number) for number in (0, 3, 1)]  # to read, to keep, data
        self.call("llvm.prefetch.p0", ir.VoidType(), later, *kind)

    def first_and_second(self, pairs):
        """The two bfloat16 numbers in each 32 bits, as float32."""
        first = self.builder.shl(pairs, self.every(16))
        second = self.builder.and_(pairs, self.every(0xFFFF0000))
        return self.builder.bitcast(first, floats), self.builder.bitcast(second, floats)

    def loop(self, count, running, body):
        """Run `body(place, values)` for place = 0, 1, …, which returns the next values; count is at least 1.

        running: the values before the first time. Returns those after the last.
        """
        builder = self.builder
        before = builder.block
        start, end = builder.append_basic_block("loop"), builder.append_basic_block("after")
        builder.branch(start)
        builder.position_at_end(start)
        place = builder.phi(i64)
        values = [builder.phi(value.type) for value in running]
        place.add_incoming(self.word(0), before)
        for value, initial in zip(values, running, strict=True):
            value.add_incoming(initial, before)
        following = body(place, values)
        next_place = builder.add(place, self.word(1))
        last = builder.block  # the body may have loops of its own
        place.add_incoming(next_place, last)
        for value, new in zip(values, following, strict=True):
            value.add_incoming(new, last)
        builder.cbranch(builder.icmp_signed("<", next_place, count), start, end)
        builder.position_at_end(end)
        return following
