"""Draws in plain torch and Python's integers, one row at a time."""

import math

import torch
from torch import Tensor

from loraplex_kernels.reference import choice
from loraplex_kernels.row_state import Chosen, RowState
from loraplex_kernels.sampling_inputs import DRAWS, IS_COUNTED, IS_REMEMBERED, Draws

MASK32, MASK64 = (1 << 32) - 1, (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15


def temper(scores: Tensor, draws: Draws, chosen: Chosen, logsums: Tensor) -> None:
    token_ids, logprobs = choice.most_likely(scores)
    chosen.token_ids.copy_(token_ids)
    chosen.logprobs.copy_(logprobs)
    logsums.copy_(torch.where(token_ids < 0, 0.0, scores.logsumexp(1)))
    for place, token_id in enumerate(token_ids.tolist()):
        if token_id >= 0 and draws.flags[place] & DRAWS:
            scores[place] = (scores[place] - scores[place, token_id]) / draws.temperature[place]


def draw(scores: Tensor, draws: Draws, state: RowState, chosen: Chosen, logsums: Tensor) -> None:
    for place, row in enumerate(draws.rows.tolist()):
        if chosen.token_ids[place] < 0:
            continue
        flags = int(draws.flags[place])
        num_output = int(state.num_tokens[row] - state.num_prompt[row])
        if flags & DRAWS:
            noise = exponential(int(draws.keys[place]) & MASK64, num_output, scores.shape[1])
            token_id = int((scores[place].exp() / noise).argmax())
            chosen.token_ids[place] = token_id
            logsums[place] = scores[place].logsumexp(0)
            chosen.logprobs[place] = scores[place, token_id] - logsums[place]
        token_id = int(chosen.token_ids[place])
        state.last_token_ids[row] = token_id
        state.num_tokens[row] += 1
        if flags & IS_COUNTED:
            state.counts[row, 1, token_id] += 1
        if flags & IS_REMEMBERED:
            state.outputs[row, num_output] = token_id


def exponential(seed_key: int, position: int, vocab_size: int) -> Tensor:
    """The noise of one row: a hash of its seed's key, its position and each token id."""
    key = _mix64((seed_key + (position + 1) * GOLDEN) & MASK64)
    bits = [
        _mix32((_mix32(token_id ^ 0x5BD1E995, 0) + (key & MASK32)) & MASK32, key >> 32)
        for token_id in range(vocab_size)
    ]
    return torch.tensor([-math.log1p(-((number & 0x7FFFFFFF) + 0.5) * 2.0**-31) for number in bits])


def _mix64(x: int) -> int:
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK64
    return x ^ (x >> 31)


def _mix32(x: int, key: int) -> int:
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & MASK32
    x = ((x ^ (x >> 15) ^ key) * 0x846CA68B) & MASK32
    return x ^ (x >> 16)
