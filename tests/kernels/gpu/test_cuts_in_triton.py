"""Cuts by Triton against the reference: which tokens are left."""

import pytest
import torch
from torch import Tensor
from triton_cases import DEVICE

from loraplex_kernels.gpu import cuts as gpu
from loraplex_kernels.reference import cuts as reference
from loraplex_kernels.sampling_inputs import Cuts

VOCAB = 1300
OFF = (1.0, 1.0, 1.0, 1.0)
ALL = (VOCAB, VOCAB, VOCAB, VOCAB)
NO_FLOOR = (-torch.inf,) * 4
CHOSEN = torch.zeros(5, dtype=torch.int64, device=DEVICE)


def scores_of(rows: int) -> Tensor:
    torch.manual_seed(0)
    scores = torch.randn(rows, VOCAB) * 3
    scores[0, ::3] = -torch.inf
    scores[1, [4, 1200, 77]] = scores[1].max() + 1  # ties
    scores[2] = scores[2].round()  # many of them
    return (scores - scores.amax(1, keepdim=True)).to(DEVICE)


def cuts_of(
    top_k: tuple[int, ...], top_p: tuple[float, ...], least: tuple[float, ...], typical_p: tuple[float, ...]
) -> Cuts:
    """Of the first four places; a fifth has none."""
    places = torch.arange(4, dtype=torch.int32, device=DEVICE)
    floats = [torch.tensor(values, device=DEVICE) for values in (top_p, least, typical_p)]
    return Cuts(places, torch.tensor(top_k, dtype=torch.int32, device=DEVICE), *floats)


def check(*parameters: tuple[float, ...]) -> None:
    ours, truth = scores_of(5), scores_of(5)
    gpu.cut_scores(ours, cuts_of(*parameters), CHOSEN)  # type: ignore[arg-type]
    reference.cut_scores(truth, cuts_of(*parameters), CHOSEN)  # type: ignore[arg-type]
    assert torch.equal(ours, truth)
    assert ((ours > -torch.inf).sum(1) >= 1).all()


@pytest.mark.parametrize("top_k", [(1, 2, 5, 40), (VOCAB, 1, VOCAB, 600)])
@pytest.mark.parametrize("top_p", [OFF, (0.9, 0.2, 0.5, 0.99), (0.01, 1.0, 0.7, 1.0)])
def test_the_best_tokens_stay(top_k: tuple[int, ...], top_p: tuple[float, ...]) -> None:
    check(top_k, top_p, NO_FLOOR, OFF)


@pytest.mark.parametrize("typical_p", [(0.1, 0.5, 0.9, 0.99), (0.95, 0.01, 0.3, 0.6)])
def test_the_typical_tokens_stay(typical_p: tuple[float, ...]) -> None:
    check(ALL, OFF, NO_FLOOR, typical_p)


def test_all_cuts_come_one_after_the_other() -> None:
    check((900, 30, VOCAB, 50), (0.95, 1.0, 0.9, 0.8), (-3.0, -4.0, -torch.inf, -2.0), (0.9, 0.7, 1.0, 0.95))


def test_broken_rows_are_left() -> None:
    ours, chosen = scores_of(5), CHOSEN.clone()
    chosen[2] = -1
    gpu.cut_scores(ours, cuts_of((5, 5, 5, 5), OFF, NO_FLOOR, OFF), chosen)
    assert torch.equal(ours[[2, 4]], scores_of(5)[[2, 4]])
    assert (ours[[0, 3]] > -torch.inf).sum(1).tolist() == [5, 5]


def test_a_border_that_is_off_by_one_token_is_noticed() -> None:
    ours, truth = scores_of(5), scores_of(5)
    gpu.cut_scores(ours, cuts_of((6, 6, 6, 6), OFF, NO_FLOOR, OFF), CHOSEN)
    reference.cut_scores(truth, cuts_of((5, 5, 5, 5), OFF, NO_FLOOR, OFF), CHOSEN)
    assert not torch.equal(ours[3], truth[3])
