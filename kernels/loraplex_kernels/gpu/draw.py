"""Tempering and drawing, one program a row, with noise that is computed where it is used."""

import triton
import triton.language as tl
from torch import Tensor

from loraplex_kernels.gpu.choice import survey
from loraplex_kernels.row_state import Chosen, RowState
from loraplex_kernels.sampling_inputs import DRAWS, IS_COUNTED, IS_REMEMBERED, Draws

BLOCK = 4096
_DRAWS, _IS_COUNTED, _IS_REMEMBERED = tl.constexpr(DRAWS), tl.constexpr(IS_COUNTED), tl.constexpr(IS_REMEMBERED)


@triton.jit
def _mix64(x):
    """The finaliser of splitmix64."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@triton.jit
def _mix32(x, key):
    """The mixer «lowbias32» with a key put in half-way."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15) ^ key) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _exponential(key, token_ids):
    """Exponential noise of mean 1 for the tokens of a step's key."""
    low = (key & 0xFFFFFFFF).to(tl.uint32)
    high = (key >> 32).to(tl.uint32)
    bits = _mix32(_mix32((token_ids ^ 0x5BD1E995).to(tl.uint32), 0) + low, high)
    uniform = ((bits & 0x7FFFFFFF).to(tl.int32).to(tl.float32) + 0.5) * 4.656612873077393e-10  # 2^-31
    # log1p from log: what rounding took from 1 - uniform is put back as a factor, so that tiny numbers stay exact.
    rest = 1.0 - uniform
    taken = 1.0 - rest
    return tl.where(taken == 0.0, uniform, -tl.log(rest) * (uniform / tl.where(taken == 0.0, 1.0, taken)))


@triton.jit
def _temper(scores, flags, temperature, token_ids, logprobs, logsums, size, SURVEY: tl.constexpr, BLOCK: tl.constexpr):
    place = tl.program_id(0)
    scores += place.to(tl.int64) * size
    best, token_id, whole, is_sound = survey(scores, size, SURVEY)
    tl.store(token_ids + place, tl.where(is_sound, token_id, -1).to(tl.int64))
    logsum = tl.log(tl.where(is_sound, whole, 1.0))
    tl.store(logprobs + place, -logsum)
    tl.store(logsums + place, tl.where(is_sound, best + logsum, 0.0))
    if is_sound & ((tl.load(flags + place) & _DRAWS) != 0):
        heat = tl.load(temperature + place)
        tl.debug_barrier()  # other threads have read for the survey what is written below
        for start in range(0, size, BLOCK):
            column = start + tl.arange(0, BLOCK)
            numbers = tl.load(scores + column, mask=column < size, other=float("-inf"))
            tl.store(scores + column, tl.div_rn(numbers - best, heat), mask=column < size)


@triton.jit(do_not_specialize=["capacity"])
def _draw(
    scores, rows, flags, keys, last_token_ids, num_tokens, num_prompt, counts, outputs, capacity,
    token_ids, logprobs, logsums, size, BLOCK: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0)
    scores += place.to(tl.int64) * size
    row = tl.load(rows + place).to(tl.int64)
    flag = tl.load(flags + place)
    token_id = tl.load(token_ids + place)
    num_output = tl.load(num_tokens + row) - tl.load(num_prompt + row)
    is_sound = token_id >= 0
    if is_sound & ((flag & _DRAWS) != 0):
        key = tl.load(keys + place).to(tl.uint64, bitcast=True)
        key = _mix64(key + (num_output + 1).to(tl.uint64) * 0x9E3779B97F4A7C15)
        column = tl.arange(0, BLOCK)
        highest = tl.full((BLOCK,), -1.0, tl.float32)
        where = tl.zeros((BLOCK,), tl.int32)
        total = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, size, BLOCK):
            token = start + column
            numbers = tl.load(scores + token, mask=token < size, other=float("-inf"))
            weight = tl.exp(numbers)
            total += weight
            lot = tl.where(token < size, weight / _exponential(key, token), -1.0)
            is_higher = lot > highest
            where = tl.where(is_higher, token, where)
            highest = tl.where(is_higher, lot, highest)
        drawn = tl.min(tl.where(highest == tl.max(highest, 0), where, size), 0)
        logsum = tl.log(tl.sum(total, 0))
        token_id = drawn.to(tl.int64)
        tl.store(token_ids + place, token_id)
        tl.store(logprobs + place, tl.load(scores + drawn) - logsum)
        tl.store(logsums + place, logsum)
    tl.debug_barrier()  # other threads may not have read yet what is advanced below
    tl.store(last_token_ids + row, token_id, mask=is_sound)
    tl.atomic_add(num_tokens + row, 1, mask=is_sound, sem="relaxed")
    tl.atomic_add(
        counts + (row * 2 + 1) * size + token_id, 1, mask=is_sound & ((flag & _IS_COUNTED) != 0), sem="relaxed"
    )
    tl.store(
        outputs + row * capacity + num_output, token_id.to(tl.int32), mask=is_sound & ((flag & _IS_REMEMBERED) != 0)
    )


def temper(scores: Tensor, draws: Draws, chosen: Chosen, logsums: Tensor) -> None:
    size = scores.shape[1]
    _temper[(len(scores),)](
        scores, draws.flags, draws.temperature, chosen.token_ids, chosen.logprobs, logsums, size,
        SURVEY=min(2 * BLOCK, triton.next_power_of_2(size)), BLOCK=BLOCK, num_warps=8,
    )  # fmt: skip


def draw(scores: Tensor, draws: Draws, state: RowState, chosen: Chosen, logsums: Tensor) -> None:
    size = scores.shape[1]
    _draw[(len(scores),)](
        scores, draws.rows, draws.flags, draws.keys, state.last_token_ids, state.num_tokens, state.num_prompt,
        state.counts, state.outputs, state.outputs.shape[1], chosen.token_ids, chosen.logprobs, logsums, size,
        BLOCK=BLOCK, num_warps=8,
    )  # fmt: skip
