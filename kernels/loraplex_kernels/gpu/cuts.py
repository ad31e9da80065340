"""Cuts without sorting: the border is found digit by digit, 16 candidates in each of eight passes over the row.

Numbers are compared by their bits, turned so that unsigned order is the order of the numbers. The border is the highest
one from which on enough tokens, or enough probability, is left.
"""

import triton
import triton.language as tl
from torch import Tensor

from loraplex_kernels.sampling_inputs import Cuts

COUNT, MASS, TYPICAL = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
BLOCK = 1024


@triton.jit
def order_of(numbers, logsum, entropy, KIND: tl.constexpr):
    """What tokens are ordered by, highest first: the scores, or how near their information is to the entropy."""
    if KIND == TYPICAL:
        numbers = -tl.abs(numbers - logsum + entropy)
    bits = numbers.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, ~bits, bits ^ -2147483648).to(tl.uint32, bitcast=True)


@triton.jit
def border_of(scores, size, wanted, floor, logsum, entropy, KIND: tl.constexpr, BLOCK: tl.constexpr):
    """The highest key from which on tokens not below `floor` make up `wanted`, in number or probability."""
    border = floor * 0
    digit = tl.arange(0, 16)
    for turn in range(8):
        candidates = border + (digit.to(tl.uint32) << (28 - 4 * turn))
        # Summed over the columns of a block but once a turn: threads need not meet in the loop.
        parts = tl.zeros((BLOCK, 16), tl.float32)
        for start in range(0, size, BLOCK):
            column = start + tl.arange(0, BLOCK)
            numbers = tl.load(scores + column, mask=column < size, other=float("-inf")).to(tl.float32)
            key = order_of(numbers, logsum, entropy, KIND)
            weight = tl.exp(numbers - logsum)
            if KIND == COUNT:
                weight = (column < size).to(tl.float32)
            weight = tl.where(key >= floor, weight, 0.0)
            parts += tl.where(key[:, None] >= candidates[None, :], weight[:, None], 0.0)
        found = tl.sum(parts, 0)
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
        key = order_of(numbers, logsum, entropy, KIND)
        tl.store(scores + column, tl.where(key >= border, numbers, float("-inf")), mask=column < size)


@triton.jit
def _entropy(scores, size, logsum, BLOCK: tl.constexpr):
    information = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, size, BLOCK):
        column = start + tl.arange(0, BLOCK)
        logprob = tl.load(scores + column, mask=column < size, other=float("-inf")) - logsum
        information -= tl.where(logprob == float("-inf"), 0.0, tl.exp(logprob) * tl.maximum(logprob, -3e38))
    return tl.sum(information, 0)


@triton.jit
def _cut_scores(scores, places, token_ids, top_k, top_p, least, typical_p, size, BLOCK: tl.constexpr):
    entry = tl.program_id(0)
    place = tl.load(places + entry).to(tl.int64)
    if tl.load(token_ids + place) < 0:
        return
    scores += place * size
    most = tl.load(top_k + entry)
    share = tl.load(top_p + entry)
    floor = tl.load(least + entry)
    typical = tl.load(typical_p + entry)
    lowest = tl.min(tl.zeros((1,), tl.int32).to(tl.uint32, bitcast=True), 0)
    # What other threads have cut is read after each barrier.
    if most < size:
        border = border_of(scores, size, most.to(tl.float32), lowest, 0.0, 0.0, COUNT, BLOCK)
        _cut(scores, size, border, 0.0, 0.0, COUNT, BLOCK)
        tl.debug_barrier()
    if share < 1.0:
        logsum = _logsum(scores, size, BLOCK)
        border = border_of(scores, size, share, lowest, logsum, 0.0, MASS, BLOCK)
        _cut(scores, size, border, logsum, 0.0, MASS, BLOCK)
        tl.debug_barrier()
    if floor > float("-inf"):
        for start in range(0, size, BLOCK):
            column = start + tl.arange(0, BLOCK)
            numbers = tl.load(scores + column, mask=column < size, other=float("-inf"))
            tl.store(scores + column, tl.where(numbers < floor, float("-inf"), numbers), mask=column < size)
        tl.debug_barrier()
    if typical < 1.0:
        logsum = _logsum(scores, size, BLOCK)
        entropy = _entropy(scores, size, logsum, BLOCK)
        border = border_of(scores, size, typical, lowest, logsum, entropy, TYPICAL, BLOCK)
        _cut(scores, size, border, logsum, entropy, TYPICAL, BLOCK)


def cut_scores(scores: Tensor, cuts: Cuts, token_ids: Tensor) -> None:
    _cut_scores[(len(cuts.places),)](
        scores, cuts.places, token_ids, cuts.top_k, cuts.top_p, cuts.least, cuts.typical_p, scores.shape[1],
        BLOCK=BLOCK, num_warps=8,
    )  # fmt: skip
