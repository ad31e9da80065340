"""The likeliest tokens without sorting, by the border that cuts use; one program a row."""

import triton
import triton.language as tl
from torch import Tensor

from loraplex_kernels.gpu.choice import survey
from loraplex_kernels.gpu.cuts import COUNT, border_of, order_of
from loraplex_kernels.row_state import Tops

BLOCK = 1024
SURVEY = 8192


@triton.jit(do_not_specialize=["most"])
def _top_tokens(
    scores, row_stride, lines, counts, logsums, num_found, token_ids, logprobs, most, size, BLOCK: tl.constexpr
):
    entry = tl.program_id(0)
    line = tl.load(lines + entry).to(tl.int64)
    scores += line * row_stride
    logsum = tl.load(logsums + line)
    wanted = tl.minimum(tl.load(counts + entry), size)
    lowest = tl.min(tl.zeros((1,), tl.int32).to(tl.uint32, bitcast=True), 0)
    border = border_of(scores, size, wanted.to(tl.float32), lowest, 0.0, 0.0, COUNT, BLOCK)
    num_higher = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, size, BLOCK):
        column = start + tl.arange(0, BLOCK)
        numbers = tl.load(scores + column, mask=column < size, other=float("-inf")).to(tl.float32)
        num_higher += ((order_of(numbers, 0.0, 0.0, COUNT) > border) & (numbers > float("-inf"))).to(tl.int32)
    # First those above the border, then those on it, in the order of their ids, up to what is wanted.
    next_higher = entry.to(tl.int64) * most
    next_equal = next_higher + tl.sum(num_higher, 0)
    end = next_higher + wanted
    for start in range(0, size, BLOCK):
        column = start + tl.arange(0, BLOCK)
        numbers = tl.load(scores + column, mask=column < size, other=float("-inf")).to(tl.float32)
        key = order_of(numbers, 0.0, 0.0, COUNT)
        is_higher = ((key > border) & (numbers > float("-inf"))).to(tl.int32)
        is_equal = ((key == border) & (numbers > float("-inf"))).to(tl.int32)
        cell = tl.where(is_higher != 0, next_higher + tl.cumsum(is_higher, 0), next_equal + tl.cumsum(is_equal, 0)) - 1
        is_taken = (is_higher != 0) | ((is_equal != 0) & (cell < end))
        tl.store(token_ids + cell, column, mask=is_taken)
        tl.store(logprobs + cell, numbers - logsum, mask=is_taken)
        next_higher += tl.sum(is_higher, 0)
        next_equal += tl.sum(is_equal, 0)
    tl.store(num_found + entry, (tl.minimum(next_equal, end) - entry.to(tl.int64) * most).to(tl.int32))


@triton.jit
def _given_tokens(logits, row_stride, token_ids, logsums, logprobs, size, BLOCK: tl.constexpr):
    line = tl.program_id(0)
    logits += line.to(tl.int64) * row_stride
    best, _token_id, whole, is_sound = survey(logits, size, BLOCK)
    logsum = tl.where(is_sound, best + tl.log(whole), float("nan"))
    tl.store(logsums + line, logsum)
    tl.store(logprobs + line, tl.load(logits + tl.load(token_ids + line)).to(tl.float32) - logsum)


def top_tokens(scores: Tensor, lines: Tensor, counts: Tensor, logsums: Tensor, tops: Tops) -> None:
    _top_tokens[(len(lines),)](
        scores, scores.stride(0), lines, counts, logsums, tops.num_found, tops.token_ids, tops.logprobs,
        tops.token_ids.shape[1], scores.shape[1], BLOCK=BLOCK, num_warps=8,
    )  # fmt: skip


def given_tokens(logits: Tensor, token_ids: Tensor, logsums: Tensor, logprobs: Tensor) -> None:
    size = logits.shape[1]
    _given_tokens[(len(logits),)](
        logits, logits.stride(0), token_ids, logsums, logprobs, size,
        BLOCK=min(SURVEY, triton.next_power_of_2(size)), num_warps=8,
    )  # fmt: skip
