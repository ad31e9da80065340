"""Cuts in plain torch, one row and one token at a time."""

import torch
from torch import Tensor


def keep_top(scores: Tensor, top_k: Tensor, top_p: Tensor) -> None:
    for row, most, share in zip(scores, top_k.tolist(), top_p.tolist(), strict=True):
        best = row.sort(descending=True).values
        row[row < best[most - 1]] = -torch.inf
        if share < 1:
            _keep_share(row, row, share)


def keep_typical(scores: Tensor, typical_p: Tensor) -> None:
    for row, share in zip(scores, typical_p.tolist(), strict=True):
        logprobs = row.log_softmax(0)
        entropy = -(logprobs.exp() * logprobs).nansum()
        _keep_share(row, -(logprobs + entropy).abs(), share)


def _keep_share(row: Tensor, order: Tensor, share: float) -> None:
    """Cut what stands behind those that, from the highest of `order` on, reach that share of the probability."""
    probs, reached = row.softmax(0), 0.0
    for token_id in order.argsort(descending=True).tolist():
        reached += float(probs[token_id])
        if reached >= share:
            row[order < order[token_id]] = -torch.inf
            return
