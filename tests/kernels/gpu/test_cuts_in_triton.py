"""Cuts by Triton against the reference: which tokens are left."""

import pytest
import torch
from torch import Tensor
from triton_cases import DEVICE

from loraplex_kernels.gpu import cuts as gpu
from loraplex_kernels.reference import cuts as reference

VOCAB = 1300


def scores_of(rows: int) -> Tensor:
    torch.manual_seed(0)
    scores = torch.randn(rows, VOCAB) * 3
    scores[0, ::3] = -torch.inf
    scores[1, [4, 1200, 77]] = scores[1].max() + 1  # ties
    scores[2] = scores[2].round()  # many of them
    return (scores - scores.amax(1, keepdim=True)).to(DEVICE)


def numbers(*values: float, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.tensor(values, dtype=dtype, device=DEVICE)


@pytest.mark.parametrize("top_k", [(1, 2, 5, 40), (VOCAB, 1, VOCAB, 600)])
@pytest.mark.parametrize("top_p", [(1.0, 1.0, 1.0, 1.0), (0.9, 0.2, 0.5, 0.99), (0.01, 1.0, 0.7, 1.0)])
def test_the_best_tokens_stay(top_k: tuple[int, ...], top_p: tuple[float, ...]) -> None:
    ours, truth = scores_of(4), scores_of(4)
    arguments = (numbers(*top_k, dtype=torch.int64), numbers(*top_p))
    gpu.keep_top(ours, *arguments)
    reference.keep_top(truth, *arguments)
    assert torch.equal(ours, truth)
    assert ((ours > -torch.inf).sum(1) >= 1).all()


@pytest.mark.parametrize("typical_p", [(0.1, 0.5, 0.9, 0.99), (0.95, 0.01, 0.3, 0.6)])
def test_the_typical_tokens_stay(typical_p: tuple[float, ...]) -> None:
    ours, truth = scores_of(4), scores_of(4)
    gpu.keep_typical(ours, numbers(*typical_p))
    reference.keep_typical(truth, numbers(*typical_p))
    assert torch.equal(ours > -torch.inf, truth > -torch.inf)


def test_a_border_that_is_off_by_one_token_is_noticed() -> None:
    ours, truth = scores_of(4), scores_of(4)
    off = numbers(1.0, 1.0, 1.0, 1.0)
    gpu.keep_top(ours, numbers(6, 6, 6, 6, dtype=torch.int64), off)
    reference.keep_top(truth, numbers(5, 5, 5, 5, dtype=torch.int64), off)
    assert not torch.equal(ours[3], truth[3])
