"""The most likely token in plain torch."""

import torch
from torch import Tensor


def most_likely(logits: Tensor) -> tuple[Tensor, Tensor]:
    scores = logits.float()
    token_ids = scores.argmax(1)
    logprobs = scores.log_softmax(1).gather(1, token_ids.unsqueeze(1)).squeeze(1)
    is_sound = scores.gather(1, token_ids.unsqueeze(1)).squeeze(1).isfinite() & ~scores.isnan().any(1)
    return torch.where(is_sound, token_ids, -1), torch.where(is_sound, logprobs, 0.0)
