"""Log-probabilities to report in plain torch, one line at a time."""

import torch
from torch import Tensor

from loraplex_kernels.row_state import Tops


def top_tokens(scores: Tensor, lines: Tensor, counts: Tensor, logsums: Tensor, tops: Tops) -> None:
    for i, (line, count) in enumerate(zip(lines.tolist(), counts.tolist(), strict=True)):
        row = scores[line].float()
        best = row.argsort(descending=True, stable=True)[:count]
        best = best[row[best] > -torch.inf]
        tops.num_found[i] = len(best)
        tops.token_ids[i, : len(best)] = best
        tops.logprobs[i, : len(best)] = row[best] - logsums[line]


def given_tokens(logits: Tensor, token_ids: Tensor, logsums: Tensor, logprobs: Tensor) -> None:
    logsums.copy_(logits.float().logsumexp(1))
    logprobs.copy_(logits.float().log_softmax(1).gather(1, token_ids[:, None])[:, 0])
