"""Tempering, drawing and advancing by Triton against the reference, whose noise is Python's integers."""

import pytest
import torch
from torch import Tensor
from triton_cases import DEVICE

from loraplex_kernels.gpu import choice as gpu_choice
from loraplex_kernels.gpu import draw as gpu
from loraplex_kernels.gpu import top_tokens as gpu_tops
from loraplex_kernels.reference import choice as reference_choice
from loraplex_kernels.reference import draw as reference
from loraplex_kernels.reference import top_tokens as reference_tops
from loraplex_kernels.row_state import Chosen, RowState, Tops
from loraplex_kernels.sampling_inputs import DRAWS, IS_COUNTED, IS_REMEMBERED, Draws

PLACES, ROWS = 5, 7
BROKEN = 2
KEYS = [0, 1, -1, 1 << 62, -(1 << 63)]


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def draws_of(keys: list[int]) -> Draws:
    return Draws(
        ints(6, 0, 3, 2, 5),
        ints(DRAWS, 0, DRAWS | IS_COUNTED, DRAWS | IS_REMEMBERED, IS_COUNTED),
        torch.tensor([1.0, 1.0, 1.0, 0.5, 1.0], device=DEVICE),
        torch.tensor(keys, device=DEVICE),
    )


def state_of(vocab_size: int) -> RowState:
    return RowState(
        torch.full((ROWS,), 77, dtype=torch.int64, device=DEVICE),
        ints(10, 11, 12, 13, 14, 15, 16),
        ints(10, 8, 8, 8, 8, 8, 8),
        torch.zeros(ROWS, 2, vocab_size, dtype=torch.int32, device=DEVICE),
        torch.zeros(ROWS, 9, dtype=torch.int32, device=DEVICE),
    )


def scores_of(vocab_size: int) -> Tensor:
    torch.manual_seed(0)
    scores = torch.randn(PLACES, vocab_size) * 2
    scores[0, ::3] = -torch.inf
    scores[BROKEN] = -torch.inf
    return scores.to(DEVICE)


def run(forms: object, vocab_size: int, keys: list[int]) -> tuple[Tensor, Chosen, Tensor, RowState]:
    scores, state = scores_of(vocab_size), state_of(vocab_size)
    chosen = Chosen(torch.zeros(PLACES, dtype=torch.int64, device=DEVICE), torch.zeros(PLACES, device=DEVICE))
    logsums = torch.zeros(PLACES, device=DEVICE)
    forms.temper(scores, draws_of(keys), chosen, logsums)  # type: ignore[attr-defined]
    forms.draw(scores, draws_of(keys), state, chosen, logsums)  # type: ignore[attr-defined]
    return scores, chosen, logsums, state


@pytest.mark.parametrize("vocab_size", [1, 33, 4096, 9000])
def test_draws_and_what_rows_remember_of_them_are_those_of_the_reference(vocab_size: int) -> None:
    scores, chosen, logsums, state = run(gpu, vocab_size, KEYS)
    true_scores, true_chosen, true_logsums, true_state = run(reference, vocab_size, KEYS)
    assert torch.allclose(scores, true_scores, atol=1e-6)
    sound = [0, 1, 3, 4] if vocab_size > 1 else [1, 3, 4]  # the only token of the first row is cut
    assert chosen.token_ids.tolist() == true_chosen.token_ids.tolist()
    assert [place for place in range(PLACES) if chosen.token_ids[place] >= 0] == sound
    assert torch.allclose(chosen.logprobs, true_chosen.logprobs, atol=1e-4)
    assert torch.allclose(logsums, true_logsums, atol=1e-4)
    for name in ("last_token_ids", "num_tokens", "num_prompt", "counts", "outputs"):
        assert torch.equal(getattr(state, name), getattr(true_state, name)), name
    assert state.last_token_ids[[1, 3, 4]].tolist() == [77, 77, 77]  # the broken row and two that are not there


def test_the_seed_of_another_row_is_noticed() -> None:
    ours, truth = run(gpu, 9000, [*KEYS[1:], KEYS[0]])[1], run(reference, 9000, KEYS)[1]
    assert ours.token_ids[0] != truth.token_ids[0] and ours.token_ids[3] != truth.token_ids[3]


def test_greedy_rows_choose_from_their_lines_and_advance() -> None:
    logits, lines, rows = scores_of(9000), ints(4, BROKEN, 1), ints(1, 3, 0)
    found = []
    for forms in (gpu_choice, reference_choice):
        state = state_of(9000)
        chosen = Chosen(torch.zeros(3, dtype=torch.int64, device=DEVICE), torch.zeros(3, device=DEVICE))
        forms.choose_rows(logits, lines, rows, state, chosen)
        found.append((chosen, state))
    (ours, state), (truth, true_state) = found
    assert ours.token_ids.tolist() == truth.token_ids.tolist() and ours.token_ids[1] == -1
    assert torch.allclose(ours.logprobs, truth.logprobs, atol=1e-4)
    assert state.last_token_ids.tolist() == true_state.last_token_ids.tolist()
    assert state.num_tokens.tolist() == true_state.num_tokens.tolist() == [11, 12, 12, 13, 14, 15, 16]


def tops_of(width: int) -> Tops:
    return Tops(ints(0, 0, 0), ints(*[-1] * 3 * width).view(3, width), torch.zeros(3, width, device=DEVICE))


@pytest.mark.parametrize("counts", [(1, 4, 7), (7, 1, 2)])
def test_the_likeliest_tokens_are_those_of_the_reference(counts: tuple[int, ...]) -> None:
    scores, logsums = scores_of(2500), torch.arange(PLACES, device=DEVICE).float()
    scores[3, 5:2000:300] = 50.0  # seven that are equal
    scores[1, 3:] = -torch.inf
    ours, truth = tops_of(7), tops_of(7)
    gpu_tops.top_tokens(scores, ints(3, 1, 4), ints(*counts), logsums, ours)
    reference_tops.top_tokens(scores, ints(3, 1, 4), ints(*counts), logsums, truth)
    assert ours.num_found.tolist() == truth.num_found.tolist() == [counts[0], min(counts[1], 3), counts[2]]
    for i, number in enumerate(ours.num_found.tolist()):
        pairs = zip(ours.token_ids[i, :number].tolist(), ours.logprobs[i, :number].tolist(), strict=True)
        ids, logprobs = zip(*sorted(pairs, key=lambda pair: (-pair[1], pair[0])), strict=True)
        assert list(ids) == truth.token_ids[i, :number].tolist()
        assert list(logprobs) == truth.logprobs[i, :number].tolist()
        assert (ours.token_ids[i, number:] == -1).all()


def test_logprobs_of_given_tokens_are_those_of_the_reference() -> None:
    logits = (scores_of(9000) * 20).half()[[0, 1, 3, 4]]
    given = torch.tensor([1, 8999, 0, 4444], device=DEVICE)
    ours, truth = torch.zeros(2, 4, device=DEVICE), torch.zeros(2, 4, device=DEVICE)
    gpu_tops.given_tokens(logits, given, *ours)
    reference_tops.given_tokens(logits, given, *truth)
    assert torch.allclose(ours, truth, atol=1e-4, rtol=1e-5)
