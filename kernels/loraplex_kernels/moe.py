"""Mixtures of experts: which experts each token goes to, and the sum of what they give."""

from dataclasses import dataclass

from torch import Tensor

from loraplex_kernels.cpu import moe as _cpu
from loraplex_kernels.reference import moe as _reference


@dataclass(frozen=True, slots=True)
class ExpertRoute:
    """T tokens' choices of k experts each, as T * k rows that are ordered by expert, and by token for each expert."""

    weights: Tensor  # [T, k] float32: the share of each choice
    rows: Tensor  # [T, k] int64: the row of each choice
    tokens: Tensor  # [T * k] int64: the token of each row
    starts: tuple[int, ...]  # of each expert's rows, and the end of the last one's


def route_tokens(scores: Tensor, num_chosen: int, rescales: bool) -> ExpertRoute:
    """Send each token to the experts with its `num_chosen` highest scores.

    scores: [T, experts], dense, of any float type. A choice's weight is the softmax of its score over all experts, in
    float32; with `rescales` a token's weights are divided by their sum.
    """
    route = _cpu.route_tokens if scores.is_cpu else _reference.route_tokens
    return ExpertRoute(*route(scores, num_chosen, rescales))


def sum_experts(rows: Tensor, route: ExpertRoute, addend: Tensor | None = None) -> Tensor:
    """Return each token's sum of its rows, by weight, plus `addend` [T, size], dense, where given; [T, size].

    rows: [T * k, size], dense, in the order of `route`. The sum is taken in float32.
    """
    operation = _cpu.sum_experts if rows.is_cpu else _reference.sum_experts
    return operation(rows, route.rows, route.weights, addend)
