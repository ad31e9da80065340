"""What the compiled CPU kernels stand on: numba, raw addresses, and numbers in float32 or bfloat16.

At a few rows a decode step is hundreds of calls on small tensors, so a kernel takes addresses and sizes as plain
integers: that costs 0.3 us a call, where each array would cost one more. numba knows no bfloat16: such a number is its
16 bits, the upper half of a float32. Sums are taken in float32. Compiled code is kept on disk, beside the source or in
the user's cache, so that only the first start pays for compiling; in a folder named after all of these sources, since
numba looks at the one file that a function stands in, and not at those whose code it has taken in.
"""

import hashlib
from pathlib import Path

import numba
import numba.core.caching
import numpy as np
import torch
from numba import types
from numba.extending import intrinsic, overload

COMPILED_DTYPES = (torch.float32, torch.bfloat16)

# Order of sums and fused multiply-adds are free; not-a-number and infinity keep their meaning.
FAST_MATH = {"reassoc", "contract", "nsz", "arcp"}


def _can_keep_code():
    """Whether compiled code can be kept: numba refuses where neither the source's folder nor a cache is writable."""
    try:
        numba.njit(cache=True)(_can_keep_code)
    except RuntimeError:
        return False
    return True


CAN_KEEP_CODE = _can_keep_code()


def _code_folder():
    """Where numba itself would keep the code of this file."""
    return Path(numba.core.caching.CompileResultCacheImpl(_can_keep_code).locator.get_cache_path())


def kept_code_folder():
    """Where the compiled code of these sources is kept; None where nothing can be."""
    if not CAN_KEEP_CODE:
        return None
    return _code_folder() if numba.config.CACHE_DIR else _code_folder() / _SOURCES


def sources_digest(folder):
    """A name for the sources in a folder as they are."""
    hasher = hashlib.sha256()
    for source in sorted(folder.glob("*.py")):
        hasher.update(source.read_bytes())
    return hasher.hexdigest()[:16]


_SOURCES = sources_digest(Path(__file__).parent)


def kept(decorate, function):
    """What numba's `decorate` makes of a function, its code kept for these sources and no others."""
    before = numba.config.CACHE_DIR
    if (folder := kept_code_folder()) is not None and not before:
        numba.config.CACHE_DIR = str(folder)
    try:
        return decorate(function)
    finally:
        numba.config.CACHE_DIR = before


def jit(function):
    """Compile a function at its first call for each kind of arguments."""
    return kept(numba.njit(nogil=True, cache=CAN_KEEP_CODE, fastmath=FAST_MATH, error_model="numpy"), function)


def inline(function):
    """The same for one that becomes part of those that call it."""
    options = {"nogil": True, "fastmath": FAST_MATH, "error_model": "numpy", "inline": "always"}
    return kept(numba.njit(cache=CAN_KEEP_CODE, **options), function)


def is_compiled(dtype: torch.dtype) -> bool:
    """Whether the compiled kernels know numbers of this kind."""
    return dtype in COMPILED_DTYPES


def _pointer(element):
    @intrinsic
    def pointer(typing_context, address):
        def generate(context, builder, signature, arguments):
            return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

        return types.CPointer(element)(address), generate

    return pointer


_float32_at = _pointer(types.float32)
_uint16_at = _pointer(types.uint16)
_uint8_at = _pointer(types.uint8)
_int8_at = _pointer(types.int8)
_int32_at = _pointer(types.int32)
_int64_at = _pointer(types.int64)


@inline
def floats(address, shape):
    """The float32 numbers at an address."""
    return numba.carray(_float32_at(address), shape)


@inline
def halves(address, shape):
    """The bfloat16 numbers at an address, as their bits."""
    return numba.carray(_uint16_at(address), shape)


@inline
def octets(address, shape):
    """The uint8 numbers at an address."""
    return numba.carray(_uint8_at(address), shape)


@inline
def signed_octets(address, shape):
    """The int8 numbers at an address."""
    return numba.carray(_int8_at(address), shape)


@inline
def ints(address, shape):
    """The int32 numbers at an address."""
    return numba.carray(_int32_at(address), shape)


@inline
def longs(address, shape):
    """The int64 numbers at an address."""
    return numba.carray(_int64_at(address), shape)


def numbers_like(like, address, shape):
    """The numbers at an address, of the kind that `like` holds."""


@overload(numbers_like, inline="always")
def _numbers_like(like, address, shape):
    if isinstance(like.dtype, types.Float):
        return lambda like, address, shape: floats(address, shape)
    return lambda like, address, shape: halves(address, shape)


def load(number):
    """A stored number as float32."""


def store(number, like):
    """A float32 number as it is stored beside `like`; to bfloat16 by rounding to the nearest, ties to even."""


@overload(load, inline="always")
def _load(number):
    if isinstance(number, types.Float):
        return lambda number: number
    return lambda number: np.uint32(np.uint32(number) << np.uint32(16)).view(np.float32)


@overload(store, inline="always")
def _store(number, like):
    if isinstance(like, types.Float):
        return lambda number, like: number

    def rounded(number, like):
        bits = np.float32(number).view(np.uint32)
        if (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000):
            return np.uint16(0x7FC0)  # not a number: rounding could make it an infinity
        half = np.uint32(np.uint32(0x7FFF) + np.uint32((bits >> np.uint32(16)) & np.uint32(1)))
        return np.uint16(np.uint32(bits + half) >> np.uint32(16))

    return rounded


@inline
def exp(x):
    """e to the power of a float32, within 2 units in the last place; a polynomial, so that loops of it vectorise.

    Below -87 it gives a number near 1e-38, above 88 one near 1e38, for not-a-number not-a-number.
    """
    bounded = min(max(x, np.float32(-87.0)), np.float32(88.0))
    whole = np.floor(bounded * np.float32(1.44269504088896341) + np.float32(0.5))
    rest = bounded - whole * np.float32(0.693359375) + whole * np.float32(2.12194440e-4)
    series = np.float32(1.9875691500e-4)
    series = series * rest + np.float32(1.3981999507e-3)
    series = series * rest + np.float32(8.3334519073e-3)
    series = series * rest + np.float32(4.1665795894e-2)
    series = series * rest + np.float32(1.6666665459e-1)
    series = series * rest + np.float32(5.0000001201e-1)
    value = series * rest * rest + rest + np.float32(1.0)
    power = np.uint32(np.int32(np.int32(whole) + np.int32(127)) << np.int32(23)).view(np.float32)
    return value * power
