"""Words that threads share, and the kernel's sleep: what compiled code needs to work as a team, and numba lacks."""

import platform
import sys

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

# Where the instructions and the system call below exist.
HAS_TEAMS = sys.platform == "linux" and platform.machine() == "x86_64"
_SYS_FUTEX = 202
_FUTEX_WAIT_PRIVATE, _FUTEX_WAKE_PRIVATE = 128, 129
_MANY = 2**31 - 1

_i64 = ir.IntType(64)


def _word(builder, address):
    return builder.inttoptr(address, ir.PointerType(_i64))


@intrinsic
def read(typing_context, address):
    """The word at an address; nothing moves across."""

    def generate(context, builder, signature, arguments):
        return builder.load_atomic(_word(builder, arguments[0]), "seq_cst", 8)

    return types.int64(types.int64), generate


@intrinsic
def write(typing_context, address, value):
    """Set the word at an address; nothing moves across."""

    def generate(context, builder, signature, arguments):
        builder.store_atomic(arguments[1], _word(builder, arguments[0]), "seq_cst", 8)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


@intrinsic
def add(typing_context, address, value):
    """Add to the word at an address; returns what it was."""

    def generate(context, builder, signature, arguments):
        return builder.atomic_rmw("add", _word(builder, arguments[0]), arguments[1], "seq_cst")

    return types.int64(types.int64, types.int64), generate


@intrinsic
def swap_if(typing_context, address, expected, value):
    """Set the word at an address if it is `expected`; returns whether it was."""

    def generate(context, builder, signature, arguments):
        found = builder.cmpxchg(_word(builder, arguments[0]), arguments[1], arguments[2], "seq_cst", "seq_cst")
        return builder.extract_value(found, 1)

    return types.boolean(types.int64, types.int64, types.int64), generate


@intrinsic
def call(typing_context, function, numbers, chunk):
    """Call the compiled function (int64, int64) at an address."""

    def generate(context, builder, signature, arguments):
        function_type = ir.FunctionType(ir.VoidType(), [_i64, _i64])
        builder.call(builder.inttoptr(arguments[0], function_type.as_pointer()), arguments[1:])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), generate


@intrinsic
def pause(typing_context):
    """Tell the processor that this is a waiting loop."""

    def generate(context, builder, signature, arguments):
        if HAS_TEAMS:
            function_type = ir.FunctionType(ir.VoidType(), [])
            builder.call(cgutils.get_or_insert_function(builder.module, function_type, "llvm.x86.sse2.pause"), [])
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic
def yield_core(typing_context):
    """Let another thread have the core."""

    def generate(context, builder, signature, arguments):
        function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(ir.IntType(32), []), "sched_yield")
        builder.call(function, [])
        return context.get_dummy_value()

    return types.void(), generate


def _futex(builder, address, operation, value):
    function_type = ir.FunctionType(_i64, [_i64] * 7)
    function = cgutils.get_or_insert_function(builder.module, function_type, "syscall")
    number = [ir.Constant(_i64, n) for n in (_SYS_FUTEX, operation, 0)]
    builder.call(function, [number[0], address, number[1], value, number[2], number[2], number[2]])


@intrinsic
def sleep_while(typing_context, address, value):
    """Sleep as long as the 32 bits at an address are `value` and nobody calls `wake`; may return without cause."""

    def generate(context, builder, signature, arguments):
        _futex(builder, arguments[0], _FUTEX_WAIT_PRIVATE, arguments[1])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


@intrinsic
def wake(typing_context, address):
    """Wake all that sleep at an address."""

    def generate(context, builder, signature, arguments):
        _futex(builder, arguments[0], _FUTEX_WAKE_PRIVATE, ir.Constant(_i64, _MANY))
        return context.get_dummy_value()

    return types.void(types.int64), generate
