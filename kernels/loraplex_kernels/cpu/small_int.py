"""Whole-number weights on the CPU: few rows read them in blocks, many rows a copy that was widened for them.

At a few rows reading the small numbers is all the work. At many rows the processor's bfloat16 products count, so the
weight is widened into a scratch, which costs a fraction of the product.
"""

import numpy as np
import torch
from torch import Tensor

from loraplex_kernels.cpu.block_sums import BLOCK
from loraplex_kernels.cpu.compiled import floats, halves, jit, load, octets, signed_octets, store
from loraplex_kernels.cpu.few_rows import INT4, INT8, BlockedWeight, product
from loraplex_kernels.lora import Deltas, add_deltas

# Up to so many rows the blocks are read as they are.
FEW_ROWS = 16


def pack_int8(numbers: Tensor) -> Tensor:
    return numbers.view(-1, BLOCK, numbers.shape[1]).transpose(1, 2).contiguous()


def unpack_int8(packed: Tensor) -> Tensor:
    return packed.transpose(1, 2).reshape(-1, packed.shape[1])


def pack_int4(numbers: Tensor) -> Tensor:
    pairs = numbers.view(-1, BLOCK, numbers.shape[1] // 2, 2).permute(3, 0, 2, 1)
    return (pairs[0] | pairs[1] << 4).contiguous()


def unpack_int4(packed: Tensor) -> Tensor:
    pairs = torch.stack((packed & 15, packed >> 4), dim=-1)
    return pairs.transpose(1, 2).reshape(len(packed) * BLOCK, -1)


@jit
def _widen_int8(numbers, scales, num_blocks, in_size, out):
    source, target = signed_octets(numbers, (num_blocks, in_size, BLOCK)), halves(out, (in_size, num_blocks * BLOCK))
    factors = floats(scales, num_blocks * BLOCK)
    for block in range(num_blocks):
        first = block * BLOCK
        for i in range(in_size):
            for d in range(BLOCK):
                target[i, first + d] = store(np.float32(source[block, i, d]) * factors[first + d], target[0, 0])


@jit
def _widen_int4(numbers, groups, num_blocks, in_size, group_size, out):
    out_size = num_blocks * BLOCK
    source, target = octets(numbers, (num_blocks, in_size // 2, BLOCK)), halves(out, (in_size, out_size))
    pairs = halves(groups, (in_size // group_size, out_size, 2))
    scales, offsets = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32)
    for block in range(num_blocks):
        first = block * BLOCK
        for pair in range(in_size // 2):
            group = 2 * pair // group_size
            if 2 * pair % group_size == 0:
                for d in range(BLOCK):
                    scales[d] = load(pairs[group, first + d, 0])
                    offsets[d] = load(pairs[group, first + d, 1]) - np.float32(8) * scales[d]
            # A loop for each line: one loop over both was not vectorised, and took ten times as long.
            line = target[2 * pair, first : first + BLOCK]
            for d in range(BLOCK):
                lower = np.float32(np.int32(source[block, pair, d] & np.uint8(15)))
                line[d] = store(lower * scales[d] + offsets[d], line[0])
            line = target[2 * pair + 1, first : first + BLOCK]
            for d in range(BLOCK):
                upper = np.float32(np.int32(source[block, pair, d] >> np.uint8(4)))
                line[d] = store(upper * scales[d] + offsets[d], line[0])


def int8_linear(
    x: Tensor, packed: Tensor, scales: Tensor, bias: Tensor | None, addend: Tensor | None, deltas: Deltas | None
) -> Tensor:
    num_blocks, in_size, _ = packed.shape
    if len(x) <= FEW_ROWS:
        weight = BlockedWeight(INT8, packed.data_ptr(), num_blocks * BLOCK, in_size, scales.data_ptr())
        return product(x, weight, bias, addend, deltas)
    widened = torch.empty(in_size, num_blocks * BLOCK, dtype=torch.bfloat16)
    _widen_int8(packed.data_ptr(), scales.data_ptr(), num_blocks, in_size, widened.data_ptr())
    return _finish(x, x @ widened, bias, addend, deltas)


def int4_linear(
    x: Tensor, packed: Tensor, groups: Tensor, bias: Tensor | None, addend: Tensor | None, deltas: Deltas | None
) -> Tensor:
    num_blocks, in_size = len(packed), 2 * packed.shape[1]
    group_size = in_size // len(groups)
    if len(x) <= FEW_ROWS:
        address = packed.data_ptr()
        weight = BlockedWeight(INT4, address, num_blocks * BLOCK, in_size, groups.data_ptr(), group_size)
        return product(x, weight, bias, addend, deltas)
    widened = torch.empty(in_size, num_blocks * BLOCK, dtype=torch.bfloat16)
    _widen_int4(packed.data_ptr(), groups.data_ptr(), num_blocks, in_size, group_size, widened.data_ptr())
    return _finish(x, x @ widened, bias, addend, deltas)


def _finish(x: Tensor, out: Tensor, bias: Tensor | None, addend: Tensor | None, deltas: Deltas | None) -> Tensor:
    if bias is not None:
        out += bias
    if addend is not None:
        out += addend
    if deltas is not None:
        add_deltas(x, deltas, out)
    return out
