"""The most likely token in plain torch."""

import torch
from torch import Tensor

from loraplex_kernels.row_state import Chosen, RowState


def most_likely(logits: Tensor) -> tuple[Tensor, Tensor]:
    scores = logits.float()
    token_ids = scores.argmax(1)
    logprobs = scores.log_softmax(1).gather(1, token_ids.unsqueeze(1)).squeeze(1)
    is_sound = scores.gather(1, token_ids.unsqueeze(1)).squeeze(1).isfinite() & ~scores.isnan().any(1)
    return torch.where(is_sound, token_ids, -1), torch.where(is_sound, logprobs, 0.0)


def choose_rows(logits: Tensor, lines: Tensor, rows: Tensor, state: RowState, chosen: Chosen) -> None:
    token_ids, logprobs = most_likely(logits[lines.long()])
    chosen.token_ids.copy_(token_ids)
    chosen.logprobs.copy_(logprobs)
    for row, token_id in zip(rows.tolist(), token_ids.tolist(), strict=True):
        if token_id >= 0:
            state.last_token_ids[row] = token_id
            state.num_tokens[row] += 1
