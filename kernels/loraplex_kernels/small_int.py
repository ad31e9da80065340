"""Linear layers whose weights are kept as whole numbers of 8 or 4 bits; activations are not rounded."""

import torch
from torch import Tensor

from loraplex_kernels.cpu import small_int as _cpu
from loraplex_kernels.reference import small_int as _reference

INT4_GROUPS = (256, 128, 64, 32)


def is_int8_kept(in_size: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether `int8_linear` has a form that reads 8 bits, for that many inputs of that type on that device."""
    return in_size % _cpu.INT8_INPUTS == 0 and device.type == "cpu" and dtype is torch.bfloat16


def int8_linear(
    x: Tensor, numbers: Tensor, scales: Tensor, bias: Tensor | None = None, addend: Tensor | None = None
) -> Tensor:
    """Return (x @ numbers.T) * scales + bias + addend; bias and addend may be absent.

    x: [T, in], dense; numbers: [out, in] int8, dense; scales: [out], bias: [out], addend: [T, out], all of x's dtype.
    """
    if is_int8_kept(x.shape[1], x.dtype, x.device):
        return _cpu.int8_linear(x, numbers, scales, bias, addend)
    return _reference.int8_linear(x, numbers, scales, bias, addend)


def is_int4_kept(out_size: int, in_size: int, group_size: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a weight of that shape can be packed by `pack_int4` for activations of that type on that device."""
    fits = out_size % 16 == 0 and in_size % group_size == 0 and group_size in INT4_GROUPS
    return fits and device.type == "cpu" and dtype is torch.bfloat16


def pack_int4(numbers: Tensor) -> Tensor:
    """Return numbers [out, in] uint8, below 16, two in an octet, in the order that `int4_linear` reads."""
    return _cpu.pack_int4(numbers)


def unpack_int4(packed: Tensor, scales_and_offsets: Tensor, group_size: int) -> Tensor:
    """Return the weight [out, in] in float32 for which these stand; see `int4_linear`."""
    return _cpu.unpack_int4(packed, scales_and_offsets, group_size)


def int4_linear(
    x: Tensor,
    packed: Tensor,
    scales_and_offsets: Tensor,
    group_size: int,
    bias: Tensor | None = None,
    addend: Tensor | None = None,
) -> Tensor:
    """Return x @ weight.T + bias + addend, where weight = (number - 8) * scale + offset of its group.

    x: [T, in] bfloat16, dense; packed: of numbers [out, in], from `pack_int4`; scales_and_offsets: [in / group_size,
    out, 2] bfloat16, each number's group being that of its input; bias: [out] and addend: [T, out] may be absent.
    """
    return _cpu.int4_linear(x, packed, scales_and_offsets, group_size, bias, addend)
