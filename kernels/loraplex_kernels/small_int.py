"""Linear layers whose weights are kept as whole numbers of 8 or 4 bits; activations are not rounded."""

import torch
from torch import Tensor

from loraplex_kernels.cpu import small_int as _cpu
from loraplex_kernels.cpu.block_sums import BLOCK
from loraplex_kernels.lora import Deltas


def is_int8_kept(out_size: int, in_size: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether `int8_linear` takes a weight of that shape, for activations of that type on that device."""
    return out_size % BLOCK == 0 and in_size % 2 == 0 and device.type == "cpu" and dtype is torch.bfloat16


def is_int4_kept(out_size: int, in_size: int, group_size: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether `int4_linear` takes a weight of that shape, for activations of that type on that device."""
    return is_int8_kept(out_size, in_size, dtype, device) and in_size % group_size == 0 and group_size % 2 == 0


def pack_int8(numbers: Tensor) -> Tensor:
    """Return numbers [out, in] int8 in the order that `int8_linear` reads, [out / 64, in, 64]."""
    return _cpu.pack_int8(numbers)


def unpack_int8(packed: Tensor) -> Tensor:
    """Return the numbers [out, in] int8 that `pack_int8` was given."""
    return _cpu.unpack_int8(packed)


def pack_int4(numbers: Tensor) -> Tensor:
    """Return numbers [out, in] uint8, below 16, as `int4_linear` reads them, by two: [out / 64, in / 2, 64]."""
    return _cpu.pack_int4(numbers)


def unpack_int4(packed: Tensor) -> Tensor:
    """Return the numbers [out, in] uint8 that `pack_int4` was given."""
    return _cpu.unpack_int4(packed)


def int8_linear(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    bias: Tensor | None = None,
    addend: Tensor | None = None,
    deltas: Deltas | None = None,
) -> Tensor:
    """Return (x @ numbers.T) * scales + bias + addend + the adapters' deltas; the last three may be absent.

    x: [T, in] bfloat16, dense; packed: of numbers [out, in], from `pack_int8`; scales: [out] float32; bias: [out] and
    addend: [T, out], of x's type.
    """
    return _cpu.int8_linear(x, packed, scales, bias, addend, deltas)


def int4_linear(
    x: Tensor,
    packed: Tensor,
    scales_and_offsets: Tensor,
    bias: Tensor | None = None,
    addend: Tensor | None = None,
    deltas: Deltas | None = None,
) -> Tensor:
    """Return x @ weight.T + bias + addend + the adapters' deltas, where weight = (number - 8) * scale + offset.

    x: [T, in] bfloat16, dense; packed: of numbers [out, in], from `pack_int4`; scales_and_offsets: [groups, out, 2]
    bfloat16, for each output and run of in / groups inputs; bias: [out] and addend: [T, out], of x's type.
    """
    return _cpu.int4_linear(x, packed, scales_and_offsets, bias, addend, deltas)
