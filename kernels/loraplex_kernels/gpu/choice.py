"""The most likely token in one pass over the logits as they are: one program a row."""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 8192


@triton.jit
def _choose(logits, row_stride, token_ids, logprobs, size, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, BLOCK)
    # Of each column of blocks: the highest number so far, where it stands, and the sum of exp(number - highest).
    highest = tl.full((BLOCK,), float("-inf"), tl.float32)
    where = tl.zeros((BLOCK,), tl.int32)
    total = tl.zeros((BLOCK,), tl.float32)
    num_odd = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, size, BLOCK):
        column = start + place
        numbers = tl.load(logits + row * row_stride + column, mask=column < size, other=float("-inf")).to(tl.float32)
        is_odd = (numbers != numbers) | (numbers == float("inf"))
        num_odd += is_odd.to(tl.int32)
        numbers = tl.where(is_odd, float("-inf"), numbers)
        is_higher = numbers > highest
        top = tl.where(is_higher, numbers, highest)
        shift = tl.where(top == float("-inf"), 0.0, top)
        total = total * tl.exp(highest - shift) + tl.exp(numbers - shift)
        where = tl.where(is_higher, column, where)
        highest = top
    best = tl.max(highest, 0)
    shift = tl.where(best == float("-inf"), 0.0, best)
    whole = tl.sum(total * tl.exp(tl.where(highest == float("-inf"), float("-inf"), highest - shift)), 0)
    token_id = tl.min(tl.where(highest == best, where, size), 0)
    is_sound = (tl.sum(num_odd, 0) == 0) & (best > float("-inf"))
    tl.store(token_ids + row, tl.where(is_sound, token_id, -1).to(tl.int64))
    tl.store(logprobs + row, -tl.log(tl.where(is_sound, whole, 1.0)))


def most_likely(logits: Tensor) -> tuple[Tensor, Tensor]:
    num_rows, size = logits.shape
    token_ids = torch.empty(num_rows, dtype=torch.int64, device=logits.device)
    logprobs = torch.empty(num_rows, dtype=torch.float32, device=logits.device)
    if num_rows:
        block = min(BLOCK, triton.next_power_of_2(size))
        _choose[(num_rows,)](logits, logits.stride(0), token_ids, logprobs, size, BLOCK=block, num_warps=8)
    return token_ids, logprobs
