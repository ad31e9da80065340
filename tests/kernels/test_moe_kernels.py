"""Mixtures of experts: the compiled forms against plain torch, and what a route must hold."""

import pytest
import torch

from loraplex_kernels.moe import ExpertRoute, route_tokens, sum_experts
from loraplex_kernels.reference import moe as reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 4, 2), (1, 128, 8), (7, 4, 2), (33, 16, 3), (5, 6, 6), (40, 3, 1)]


def scores_of(num_tokens: int, num_experts: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(num_tokens, num_experts, generator=torch.Generator().manual_seed(num_tokens)).mul(2).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rescales", [False, True])
@pytest.mark.parametrize(("num_tokens", "num_experts", "num_chosen"), SHAPES)
def test_tokens_go_where_plain_torch_sends_them(
    num_tokens: int, num_experts: int, num_chosen: int, rescales: bool, dtype: torch.dtype
) -> None:
    # Distinct scores: which of equal ones is chosen is open.
    scores = scores_of(num_tokens, num_experts, torch.float32).argsort(-1).to(dtype) / 5
    ours = route_tokens(scores, num_chosen, rescales)
    truth = ExpertRoute(*reference.route_tokens(scores, num_chosen, rescales))
    assert ours.starts == truth.starts
    assert torch.equal(ours.rows, truth.rows) and torch.equal(ours.tokens, truth.tokens)
    assert torch.allclose(ours.weights, truth.weights, rtol=1e-5, atol=0)


@pytest.mark.parametrize(("num_tokens", "num_experts", "num_chosen"), SHAPES)
def test_a_route_holds_each_token_once_for_each_of_its_experts(
    num_tokens: int, num_experts: int, num_chosen: int
) -> None:
    scores = scores_of(num_tokens, num_experts, torch.float32)
    route = route_tokens(scores, num_chosen, True)
    assert route.weights.sum(-1).allclose(torch.ones(num_tokens))
    best = scores.topk(num_chosen).indices
    found: list[set[int]] = [set() for _ in range(num_tokens)]
    for expert in range(num_experts):
        tokens = route.tokens[route.starts[expert] : route.starts[expert + 1]].tolist()
        assert tokens == sorted(set(tokens))
        for token in tokens:
            found[token].add(expert)
    assert found == [set(experts) for experts in best.tolist()]
    assert torch.equal(route.tokens[route.rows], torch.arange(num_tokens)[:, None].expand(-1, num_chosen))


def test_equal_scores_still_give_different_experts() -> None:
    route = route_tokens(torch.zeros(3, 5), 4, False)
    assert route.weights.allclose(torch.full((3, 4), 0.2))
    assert len(set(route.rows.flatten().tolist())) == 12 and route.starts[-1] == 12


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_addend", [False, True])
@pytest.mark.parametrize(("num_tokens", "num_experts", "num_chosen"), SHAPES)
def test_sums_are_those_of_plain_torch(
    num_tokens: int, num_experts: int, num_chosen: int, has_addend: bool, dtype: torch.dtype
) -> None:
    route = route_tokens(scores_of(num_tokens, num_experts, torch.float32), num_chosen, False)
    generator = torch.Generator().manual_seed(2)
    rows = torch.randn(num_tokens * num_chosen, 50, generator=generator).to(dtype)
    addend = torch.randn(num_tokens, 50, generator=generator).to(dtype) if has_addend else None
    truth = reference.sum_experts(rows, route.rows, route.weights, addend).float()
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]
    assert (sum_experts(rows, route, addend).float() - truth).abs().max() <= tolerance
