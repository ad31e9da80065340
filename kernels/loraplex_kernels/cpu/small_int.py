"""Whole-number weights on the CPU: torch's kernels for few rows, products with widened weights for many.

torch's kernels read the small numbers straight from memory, which is what counts at a few rows, and compute in float32
without the processor's bfloat16 products, which is what counts at many. So from some rows on the weight is widened into
a scratch, which costs a fraction of the product, and is good for all rows.
"""

from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from loraplex_kernels.cpu.compiled import halves, inline, jit, load, octets, signed_octets

# torch's kernel reads whole vectors of inputs, and beyond the last row where they do not divide.
INT8_INPUTS = 32
# Rows from which on widening is faster; measured on one core over [1536, 576] and [4096, 4096].
MANY_ROWS_INT8 = 12
MANY_ROWS_INT4 = 96
# Orders in which torch packs, by the width of the processor's vectors.
LANES = (64, 32)

_int8_product = torch.ops.aten._weight_int8pack_mm
_int4_product = torch.ops.aten._weight_int4pack_mm_for_cpu
_int4_pack = torch.ops.aten._convert_weight_to_int4pack_for_cpu


@jit
def _widen_int8(numbers, count, out):
    source, target = signed_octets(numbers, count), halves(out, count)
    for i in range(count):  # exact: a whole number below 256 fits into bfloat16
        target[i] = np.uint16(np.float32(source[i]).view(np.uint32) >> np.uint32(16))


def int8_linear(x: Tensor, numbers: Tensor, scales: Tensor, bias: Tensor | None, addend: Tensor | None) -> Tensor:
    if len(x) < MANY_ROWS_INT8:
        out: Tensor = _int8_product(x, numbers, scales)
    else:
        widened = torch.empty_like(numbers, dtype=torch.bfloat16)
        _widen_int8(numbers.data_ptr(), numbers.numel(), widened.data_ptr())
        out = F.linear(x, widened).mul_(scales)
    return _add(out, bias, addend)


def pack_int4(numbers: Tensor) -> Tensor:
    packed: Tensor = _int4_pack(numbers.to(torch.int32), 1)
    return packed


@jit
def _widen_int4(packed, scales_and_offsets, out_size, in_size, group_size, lanes, out):
    octet_rows, target = octets(packed, out_size * in_size // 2), halves(out, (in_size, out_size))
    groups = halves(scales_and_offsets, (in_size // group_size, out_size, 2))
    scales, offsets = np.empty(lanes, np.float32), np.empty(lanes, np.float32)
    half = lanes // 2
    for group in range(in_size // group_size):
        for first in range(0, out_size, lanes):
            width = min(lanes, out_size - first)
            for d in range(width):
                scales[d] = load(groups[group, first + d, 0])
                offsets[d] = load(groups[group, first + d, 1]) - np.float32(8) * scales[d]
            # A run of outputs stands together for all inputs.
            start = first * in_size // 2 + group * group_size * (width // 2)
            for i in range(group * group_size, (group + 1) * group_size):
                row = octet_rows[start : start + width // 2]
                start += width // 2
                if width == lanes:
                    for d in range(half):
                        number = np.float32(np.int32(row[d] & np.uint8(15)))
                        target[i, first + d] = _rounded(number * scales[d] + offsets[d])
                    for d in range(half):
                        number = np.float32(np.int32(row[d] >> np.uint8(4)))
                        target[i, first + half + d] = _rounded(number * scales[half + d] + offsets[half + d])
                else:
                    for d in range(width):
                        shift = np.uint8(4 * (d % 2))
                        number = np.float32(np.int32((row[d // 2] >> shift) & np.uint8(15)))
                        target[i, first + d] = _rounded(number * scales[d] + offsets[d])


@inline
def _rounded(number):
    # As `store` does, without its case of not-a-number, which would keep this loop from being vectorised.
    bits = np.float32(number).view(np.uint32)
    odd = np.uint32((bits >> np.uint32(16)) & np.uint32(1))
    return np.uint16(np.uint32(bits + np.uint32(0x7FFF) + odd) >> np.uint32(16))


@cache
def _lanes() -> int:
    """Outputs that torch packs together on this processor; 0 where its order is none that is known here.

    The octets of an input hold output d of them in the lower and d + lanes / 2 in the upper half; of the outputs that
    are left over, an octet holds two neighbours.
    """
    numbers = torch.arange(176 * 32).view(176, 32).remainder(13).to(torch.uint8)
    ones = torch.tensor([1.0, 0.0], dtype=torch.bfloat16).expand(1, 176, 2).contiguous()
    for lanes in LANES:
        if torch.equal(_widened_int4(pack_int4(numbers), ones, 32, lanes).t(), numbers.to(torch.bfloat16) - 8):
            return lanes
    return 0


def _widened_int4(packed: Tensor, scales_and_offsets: Tensor, group_size: int, lanes: int) -> Tensor:
    """The weight, transposed: [in, out] bfloat16."""
    num_groups, out_size, _ = scales_and_offsets.shape
    in_size = num_groups * group_size
    widened = torch.empty(in_size, out_size, dtype=torch.bfloat16)
    _widen_int4(
        packed.data_ptr(), scales_and_offsets.data_ptr(), out_size, in_size, group_size, lanes, widened.data_ptr()
    )
    return widened


def unpack_int4(packed: Tensor, scales_and_offsets: Tensor, group_size: int) -> Tensor:
    if lanes := _lanes():
        return _widened_int4(packed, scales_and_offsets, group_size, lanes).t().float()
    unit = torch.eye(len(scales_and_offsets) * group_size, dtype=torch.bfloat16)
    weight: Tensor = _int4_product(unit, packed, group_size, scales_and_offsets)
    return weight.t().float()


def int4_linear(
    x: Tensor, packed: Tensor, scales_and_offsets: Tensor, group_size: int, bias: Tensor | None, addend: Tensor | None
) -> Tensor:
    if len(x) >= MANY_ROWS_INT4 and (lanes := _lanes()):
        out = x @ _widened_int4(packed, scales_and_offsets, group_size, lanes)
    else:
        out = _int4_product(x, packed, group_size, scales_and_offsets)
    return _add(out, bias, addend)


def _add(out: Tensor, bias: Tensor | None, addend: Tensor | None) -> Tensor:
    if bias is not None:
        out += bias
    if addend is not None:
        out += addend
    return out
