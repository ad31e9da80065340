"""The most likely token in one pass over the logits as they are: one program a row."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from loraplex_kernels.row_state import Chosen, RowState

BLOCK = 8192


@triton.jit
def survey(numbers, size, BLOCK: tl.constexpr):
    """The highest of `size` numbers, its first place, the sum of exp(number - highest), and whether all are sound."""
    place = tl.arange(0, BLOCK)
    # Of each column of blocks: the highest number so far, where it stands, and the sum of exp(number - highest).
    highest = tl.full((BLOCK,), float("-inf"), tl.float32)
    where = tl.zeros((BLOCK,), tl.int32)
    total = tl.zeros((BLOCK,), tl.float32)
    num_odd = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, size, BLOCK):
        column = start + place
        block = tl.load(numbers + column, mask=column < size, other=float("-inf")).to(tl.float32)
        is_odd = (block != block) | (block == float("inf"))
        num_odd += is_odd.to(tl.int32)
        block = tl.where(is_odd, float("-inf"), block)
        is_higher = block > highest
        top = tl.where(is_higher, block, highest)
        shift = tl.where(top == float("-inf"), 0.0, top)
        total = total * tl.exp(highest - shift) + tl.exp(block - shift)
        where = tl.where(is_higher, column, where)
        highest = top
    best = tl.max(highest, 0)
    shift = tl.where(best == float("-inf"), 0.0, best)
    whole = tl.sum(total * tl.exp(tl.where(highest == float("-inf"), float("-inf"), highest - shift)), 0)
    token_id = tl.min(tl.where(highest == best, where, size), 0)
    is_sound = (tl.sum(num_odd, 0) == 0) & (best > float("-inf"))
    return best, token_id, whole, is_sound


@triton.jit
def _choose(
    logits, row_stride, lines, rows, last_token_ids, num_tokens, token_ids, logprobs, size,
    HAS_ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0)
    line = place.to(tl.int64)
    if HAS_ROWS:
        line = tl.load(lines + place).to(tl.int64)
    _best, token_id, whole, is_sound = survey(logits + line * row_stride, size, BLOCK)
    tl.store(token_ids + place, tl.where(is_sound, token_id, -1).to(tl.int64))
    tl.store(logprobs + place, -tl.log(tl.where(is_sound, whole, 1.0)))
    if HAS_ROWS:
        row = tl.load(rows + place)
        tl.store(last_token_ids + row, token_id.to(tl.int64), mask=is_sound)
        tl.atomic_add(num_tokens + row, 1, mask=is_sound, sem="relaxed")


def most_likely(logits: Tensor) -> tuple[Tensor, Tensor]:
    num_rows, size = logits.shape
    token_ids = torch.empty(num_rows, dtype=torch.int64, device=logits.device)
    logprobs = torch.empty(num_rows, dtype=torch.float32, device=logits.device)
    if num_rows:
        _choose[(num_rows,)](
            logits, logits.stride(0), None, None, None, None, token_ids, logprobs, size,
            HAS_ROWS=False, BLOCK=_block(size), num_warps=8,
        )  # fmt: skip
    return token_ids, logprobs


def choose_rows(logits: Tensor, lines: Tensor, rows: Tensor, state: RowState, chosen: Chosen) -> None:
    size = logits.shape[1]
    if len(lines):
        _choose[(len(lines),)](
            logits, logits.stride(0), lines, rows, state.last_token_ids, state.num_tokens, chosen.token_ids,
            chosen.logprobs, size, HAS_ROWS=True, BLOCK=_block(size), num_warps=8,
        )  # fmt: skip


def _block(size: int) -> int:
    return min(BLOCK, int(triton.next_power_of_2(size)))
