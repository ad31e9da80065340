"""The most likely token as two compiled passes over the logits as they are, without a float32 copy of them."""

import numpy as np
import torch
from torch import Tensor

from loraplex_kernels.cpu.compiled import exp, floats, halves, is_compiled, jit, load, longs
from loraplex_kernels.reference import choice as _reference


@jit
def _choose(logits, token_ids, logprobs):
    num_rows, size = logits.shape
    for row in range(num_rows):
        highest = np.float32(-np.inf)
        num_odd = 0
        for i in range(size):
            number = load(logits[row, i])
            highest = max(highest, number)
            num_odd += number != number
        token_ids[row], logprobs[row] = -1, np.float32(0)
        if num_odd > 0 or not np.isfinite(highest):
            continue
        total = np.float32(0)
        for i in range(size):
            total += exp(load(logits[row, i]) - highest)
        place = 0
        while load(logits[row, place]) != highest:
            place += 1
        token_ids[row], logprobs[row] = place, -np.log(total)


@jit
def _most_likely(is_half, logits, num_rows, size, token_ids, logprobs):
    ids, values = longs(token_ids, num_rows), floats(logprobs, num_rows)
    if is_half:
        _choose(halves(logits, (num_rows, size)), ids, values)
    else:
        _choose(floats(logits, (num_rows, size)), ids, values)


def most_likely(logits: Tensor) -> tuple[Tensor, Tensor]:
    if not is_compiled(logits.dtype) or not logits.is_contiguous():
        return _reference.most_likely(logits)
    num_rows, size = logits.shape
    token_ids = torch.empty(num_rows, dtype=torch.int64)
    logprobs = torch.empty(num_rows, dtype=torch.float32)
    _most_likely(
        logits.dtype is torch.bfloat16, logits.data_ptr(), num_rows, size, token_ids.data_ptr(), logprobs.data_ptr()
    )
    return token_ids, logprobs
