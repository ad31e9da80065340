"""Mixtures of experts in plain torch."""

import torch
from torch import Tensor


def route_tokens(scores: Tensor, num_chosen: int, rescales: bool) -> tuple[Tensor, Tensor, Tensor, tuple[int, ...]]:
    num_tokens, num_experts = scores.shape
    weights, experts = scores.float().softmax(-1).topk(num_chosen)
    if rescales:
        weights = weights / weights.sum(-1, keepdim=True)
    order = experts.flatten().argsort(stable=True)
    rows = torch.empty_like(order)
    rows[order] = torch.arange(len(order), device=order.device)
    counts = experts.flatten().bincount(minlength=num_experts)
    starts = (0, *counts.cumsum(0).tolist())
    return weights, rows.view(num_tokens, num_chosen), order // num_chosen, starts


def sum_experts(rows: Tensor, places: Tensor, weights: Tensor, addend: Tensor | None) -> Tensor:
    total = (rows[places].float() * weights.unsqueeze(-1)).sum(1)
    return (total if addend is None else total + addend.float()).to(rows.dtype)
