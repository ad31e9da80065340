"""Cuts in plain torch, one row and one token at a time."""

import torch
from torch import Tensor

from loraplex_kernels.sampling_inputs import Cuts


def cut_scores(scores: Tensor, cuts: Cuts, token_ids: Tensor) -> None:
    columns = (cuts.places, cuts.top_k, cuts.top_p, cuts.least, cuts.typical_p)
    for place, top_k, top_p, least, typical_p in zip(*(column.tolist() for column in columns), strict=True):
        if token_ids[place] < 0:
            continue
        row = scores[place]
        best = row.sort(descending=True).values
        row[row < best[top_k - 1]] = -torch.inf
        if top_p < 1:
            _keep_share(row, row, top_p)
        row[row < least] = -torch.inf
        if typical_p < 1:
            logprobs = row.log_softmax(0)
            entropy = -(logprobs.exp() * logprobs).nansum()
            _keep_share(row, -(logprobs + entropy).abs(), typical_p)


def _keep_share(row: Tensor, order: Tensor, share: float) -> None:
    """Cut what stands behind those that, from the highest of `order` on, reach that share of the probability."""
    probs, reached = row.softmax(0), 0.0
    for token_id in order.argsort(descending=True).tolist():
        reached += float(probs[token_id])
        if reached >= share:
            row[order < order[token_id]] = -torch.inf
            return
