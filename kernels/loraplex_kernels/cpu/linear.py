"""Linear layers over oneDNN's blocked weights: two to four times as fast as the plain layout at few rows."""

import ctypes
from dataclasses import dataclass

import llvmlite.binding
import torch
from torch import Tensor

from loraplex_kernels.cpu.few_rows import BLOCK, is_served, product

# How many rows to expect; measured to make no difference to the layout chosen between 1 and 64.
TYPICAL_ROWS = 8
# Up to so many rows `few_rows` is faster than oneDNN's product.
FEW_ROWS = 32


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """A weight [out_size, in_size] in oneDNN's layout. `address`: where it lies, if `few_rows` can read it; else 0."""

    tensor: Tensor
    out_size: int
    in_size: int
    address: int


def pack_weight(weight: Tensor) -> Tensor | PackedWeight:
    if not is_packable(weight.dtype):
        return weight
    out_size, in_size = weight.shape
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), TYPICAL_ROWS)
    return PackedWeight(packed, out_size, in_size, _blocked_address(packed, weight))


def is_packable(dtype: torch.dtype) -> bool:
    """Whether oneDNN computes in `dtype` on this processor."""
    if not torch._C._has_mkldnn:
        return False
    if dtype == torch.float32:
        return True
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype == torch.float16 and bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())


def _blocked_address(packed: Tensor, weight: Tensor) -> int:
    """The address of the numbers if they lie as `few_rows` reads them; oneDNN chooses its layout by processor."""
    out_size, in_size = weight.shape
    is_known = weight.dtype is torch.bfloat16 and is_served(llvmlite.binding.get_host_cpu_features())
    if not is_known or out_size % BLOCK or in_size % 2 or torch.ops.mkldnn._nbytes(packed) != weight.nbytes:
        return 0
    address: int = torch.ops.mkldnn.data_ptr(packed)
    for block in {0, out_size // BLOCK - 1}:
        rows = weight[block * BLOCK : (block + 1) * BLOCK].view(torch.int16)
        expected = rows.reshape(BLOCK, in_size // 2, 2).transpose(0, 1).reshape(-1)
        if not torch.equal(_int16_at(address + 2 * block * BLOCK * in_size, expected.numel()), expected):
            return 0
    return address


def _int16_at(address: int, count: int) -> Tensor:
    buffer = (ctypes.c_int16 * count).from_address(address)
    return torch.frombuffer(buffer, dtype=torch.int16)


_linear = torch.ops.mkldnn._linear_pointwise.default
_linear_binary = torch.ops.mkldnn._linear_pointwise.binary


def has_few_rows(x: Tensor, weight: PackedWeight) -> bool:
    """Whether `few_rows.product` is the fastest form for these rows."""
    return weight.address != 0 and len(x) <= FEW_ROWS


def linear(x: Tensor, weight: PackedWeight, bias: Tensor | None = None, addend: Tensor | None = None) -> Tensor:
    if has_few_rows(x, weight):
        return product(x, weight.address, weight.out_size, bias, addend)
    if addend is not None:
        total: Tensor = _linear_binary(x, addend, weight.tensor, bias, "add")
        return total
    out: Tensor = _linear(x, weight.tensor, bias, "none", [], "")
    return out
