"""Linear layers over oneDNN's blocked weights: two to four times as fast as the plain layout at few rows."""

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from loraplex_kernels.cpu.block_sums import BLOCK
from loraplex_kernels.cpu.few_rows import HALF, BlockedWeight
from loraplex_kernels.cpu.pairs import multiplies_halves

# How many rows to expect; measured to make no difference to the layout chosen between 1 and 64.
TYPICAL_ROWS = 8
# Up to so many rows `few_rows.product` is faster than oneDNN's.
FEW_ROWS = 32


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """A weight in oneDNN's layout. `blocks`: the same memory for `few_rows`, if it can read it."""

    tensor: Tensor
    blocks: BlockedWeight | None


def pack_weight(weight: Tensor) -> Tensor | PackedWeight:
    if not is_packable(weight.dtype):
        return weight
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), TYPICAL_ROWS)
    return PackedWeight(packed, _blocks(packed, weight))


def is_packable(dtype: torch.dtype) -> bool:
    """Whether oneDNN computes in `dtype` on this processor."""
    if not torch._C._has_mkldnn:
        return False
    if dtype == torch.float32:
        return True
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype == torch.float16 and bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())


def _blocks(packed: Tensor, weight: Tensor) -> BlockedWeight | None:
    """The packed weight for `few_rows`, if oneDNN, which chooses its layout by processor, laid it out so."""
    out_size, in_size = weight.shape
    is_served = weight.dtype is torch.bfloat16 and multiplies_halves()
    if not is_served or out_size % BLOCK or in_size % 2 or torch.ops.mkldnn._nbytes(packed) != weight.nbytes:
        return None
    address: int = torch.ops.mkldnn.data_ptr(packed)
    for block in {0, out_size // BLOCK - 1}:
        rows = weight[block * BLOCK : (block + 1) * BLOCK].view(torch.int16)
        expected = rows.reshape(BLOCK, in_size // 2, 2).transpose(0, 1).reshape(-1)
        if not torch.equal(_int16_at(address + 2 * block * BLOCK * in_size, expected.numel()), expected):
            return None
    return BlockedWeight(HALF, address, out_size, in_size)


def _int16_at(address: int, count: int) -> Tensor:
    buffer = (ctypes.c_int16 * count).from_address(address)
    return torch.frombuffer(buffer, dtype=torch.int16)


_linear = torch.ops.mkldnn._linear_pointwise.default
_linear_binary = torch.ops.mkldnn._linear_pointwise.binary


def linear(x: Tensor, weight: PackedWeight, bias: Tensor | None = None, addend: Tensor | None = None) -> Tensor:
    if addend is not None:
        total: Tensor = _linear_binary(x, addend, weight.tensor, bias, "add")
        return total
    out: Tensor = _linear(x, weight.tensor, bias, "none", [], "")
    return out
