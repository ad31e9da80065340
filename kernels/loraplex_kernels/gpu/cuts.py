"""Cuts without sorting: the border is found digit by digit, 16 candidates in each of eight passes over the row.

Numbers are compared by their bits, turned so that unsigned order is the order of the numbers. The border is the highest
one from which on enough tokens, or enough probability, is left.
"""

import triton
import triton.language as tl
from torch import Tensor

COUNT, MASS, TYPICAL = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
BLOCK = 1024


@triton.jit
def _ordered(numbers):
    bits = numbers.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, ~bits, bits ^ -2147483648).to(tl.uint32, bitcast=True)


@triton.jit
def _order_of(numbers, logsum, entropy, KIND: tl.constexpr):
    """What tokens are ordered by, highest first: the scores, or how near their information is to the entropy."""
    if KIND == TYPICAL:
        return _ordered(-tl.abs(numbers - logsum + entropy))
    return _ordered(numbers)


@triton.jit
def _border(scores, size, wanted, floor, logsum, entropy, KIND: tl.constexpr, BLOCK: tl.constexpr):
    """The highest key from which on tokens not below `floor` make up `wanted`, in number or probability."""
    border = floor * 0
    digit = tl.arange(0, 16)
    for turn in tl.static_range(8):
        candidates = border + (digit.to(tl.uint32) << (28 - 4 * turn))
        found = tl.zeros((16,), tl.float32)
        for start in range(0, size, BLOCK):
            column = start + tl.arange(0, BLOCK)
            numbers = tl.load(scores + column, mask=column < size, other=float("-inf"))
            key = _order_of(numbers, logsum, entropy, KIND)
            weight = tl.exp(numbers - logsum)
            if KIND == COUNT:
                weight = (column < size).to(tl.float32)
            weight = tl.where(key >= floor, weight, 0.0)
            found += tl.sum(tl.where(key[:, None] >= candidates[None, :], weight[:, None], 0.0), 0)
        best = tl.max(tl.where(found >= wanted, digit, 0), 0)
        border += best.to(tl.uint32) << (28 - 4 * turn)
    return border


@triton.jit
def _logsum(scores, size, BLOCK: tl.constexpr):
    highest = tl.full((BLOCK,), float("-inf"), tl.float32)
    for start in range(0, size, BLOCK):
        column = start + tl.arange(0, BLOCK)
        highest = tl.maximum(highest, tl.load(scores + column, mask=column < size, other=float("-inf")))
    top = tl.max(highest, 0)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, size, BLOCK):
        column = start + tl.arange(0, BLOCK)
        total += tl.exp(tl.load(scores + column, mask=column < size, other=float("-inf")) - top)
    return top + tl.log(tl.sum(total, 0))


@triton.jit
def _cut(scores, size, border, logsum, entropy, KIND: tl.constexpr, BLOCK: tl.constexpr):
    for start in range(0, size, BLOCK):
        column = start + tl.arange(0, BLOCK)
        numbers = tl.load(scores + column, mask=column < size, other=float("-inf"))
        key = _order_of(numbers, logsum, entropy, KIND)
        tl.store(scores + column, tl.where(key >= border, numbers, float("-inf")), mask=column < size)


@triton.jit
def _keep_top(scores, top_k, top_p, size, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    scores += row * size
    most = tl.load(top_k + row)
    share = tl.load(top_p + row)
    nothing = tl.zeros((1,), tl.int32).to(tl.uint32, bitcast=True)
    lowest = tl.min(nothing, 0)
    border = lowest
    if most < size:
        border = _border(scores, size, most.to(tl.float32), lowest, 0.0, 0.0, COUNT, BLOCK)
        _cut(scores, size, border, 0.0, 0.0, COUNT, BLOCK)
        tl.debug_barrier()  # what other threads have cut is read below
    if share < 1.0:
        logsum = _logsum(scores, size, BLOCK)
        border = _border(scores, size, share, lowest, logsum, 0.0, MASS, BLOCK)
        _cut(scores, size, border, 0.0, 0.0, MASS, BLOCK)


@triton.jit
def _keep_typical(scores, typical_p, size, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    scores += row * size
    logsum = _logsum(scores, size, BLOCK)
    information = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, size, BLOCK):
        column = start + tl.arange(0, BLOCK)
        logprob = tl.load(scores + column, mask=column < size, other=float("-inf")) - logsum
        information -= tl.where(logprob == float("-inf"), 0.0, tl.exp(logprob) * tl.maximum(logprob, -3e38))
    entropy = tl.sum(information, 0)
    nothing = tl.zeros((1,), tl.int32).to(tl.uint32, bitcast=True)
    border = _border(scores, size, tl.load(typical_p + row), tl.min(nothing, 0), logsum, entropy, TYPICAL, BLOCK)
    _cut(scores, size, border, logsum, entropy, TYPICAL, BLOCK)


def keep_top(scores: Tensor, top_k: Tensor, top_p: Tensor) -> None:
    if len(scores):
        _keep_top[(len(scores),)](scores, top_k, top_p, scores.shape[1], BLOCK=BLOCK, num_warps=8)


def keep_typical(scores: Tensor, typical_p: Tensor) -> None:
    if len(scores):
        _keep_typical[(len(scores),)](scores, typical_p, scores.shape[1], BLOCK=BLOCK, num_warps=8)
