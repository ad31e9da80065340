"""What changes scores, by Triton against the reference: masks, biases, bans, lists, penalties."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from triton_cases import DEVICE, DTYPES

from loraplex_kernels.gpu import scores as gpu
from loraplex_kernels.reference import scores as reference
from loraplex_kernels.row_state import RowState
from loraplex_kernels.sampling_inputs import Bans, Biases, Masks, Penalties

PLACES, ROWS, VOCAB = 4, 6, 5000  # two tiles, the last of them and the last word of a mask not full
NUM_WORDS = VOCAB // 32 + 2


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def floats(*values: float) -> Tensor:
    return torch.tensor(values, device=DEVICE)


def scores_of(num_rows: int, dtype: torch.dtype = torch.float32) -> Tensor:
    torch.manual_seed(1)
    return (torch.randn(num_rows, VOCAB) * 3).to(DEVICE, dtype)


def sets_of(num_sets: int, *of_place: int) -> Masks:
    torch.manual_seed(2)
    words = torch.randint(-(2**31), 2**31, (num_sets, NUM_WORDS), dtype=torch.int64).to(torch.int32)
    return Masks(words.to(DEVICE), ints(*of_place))


def state_of() -> RowState:
    torch.manual_seed(3)
    counts = torch.randint(0, 9, (ROWS, 2, VOCAB), dtype=torch.int32) // 6
    return RowState(
        torch.zeros(ROWS, dtype=torch.int64, device=DEVICE),
        ints(10, 11, 12, 13, 14, 15),
        ints(10, 8, 8, 8, 8, 8),
        counts.to(DEVICE),
        torch.arange(ROWS * 16, dtype=torch.int32, device=DEVICE).reshape(ROWS, 16),
    )


def both(change: Callable[..., None], twin: Callable[..., None], *arguments: object) -> tuple[Tensor, Tensor]:
    ours, truth = scores_of(PLACES), scores_of(PLACES)
    change(ours, *arguments)
    twin(truth, *arguments)
    return ours, truth


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("masks", [None, sets_of(2, -1, 1, -1, 0)])
def test_scores_are_the_masked_lines_of_the_logits(dtype: torch.dtype, masks: Masks | None) -> None:
    logits = torch.cat([scores_of(7, dtype), scores_of(7, dtype)], 1)[:, : VOCAB + 8][:, 8:]  # lines that lie apart
    logits[2, ::5] = float("nan")
    ours, truth = scores_of(PLACES), scores_of(PLACES)
    for copy, scores in ((gpu.copy_scores, ours), (reference.copy_scores, truth)):
        copy(logits, ints(5, 0, 2, 6), masks, scores)
    assert torch.equal(ours.nan_to_num(nan=77.0), truth.nan_to_num(nan=77.0))
    assert masks is None or torch.equal(ours[1] == -torch.inf, truth[1] == -torch.inf)


@pytest.mark.parametrize("num_entries", [1, 300])
def test_biases_are_added_to_their_scores_alone(num_entries: int) -> None:
    cells = torch.randperm(PLACES * VOCAB, generator=torch.Generator().manual_seed(4))[:num_entries].to(DEVICE)
    biases = Biases((cells // VOCAB).int(), (cells % VOCAB).int(), torch.randn(num_entries).to(DEVICE))
    ours, truth = both(gpu.add_biases, reference.add_biases, biases)
    assert torch.equal(ours, truth) and (ours != scores_of(PLACES)).sum() == num_entries


# Of the rows' outputs: row 1 ends with 16, 17, 18, row 3 with … 51, 52.
BANS = Bans(
    places=ints(0, 0, 1, 1, 1, 1, 2, 3),
    rows=ints(0, 0, 1, 1, 1, 1, 3, 5),
    token_ids=ints(9, 4999, 1, 2, 3, 4, 5, 6),
    until=ints(1, 0, 3, 4, 99, 99, 99, 7),
    starts=ints(0, 0, 0, 0, 0, 1, 4, 0),
    lengths=ints(0, 0, 0, 0, 3, 3, 2, 0),
    runs=ints(16, 17, 18, 18, 51, 52),
    longest=3,
)
BANNED = [(0, 9), (1, 2), (1, 3), (2, 5)]


def test_bans_hold_up_to_a_length_and_behind_their_run() -> None:
    ours, truth = both(gpu.ban_tokens, reference.ban_tokens, BANS, state_of())
    assert torch.equal(ours, truth)
    assert (ours == -torch.inf).nonzero().tolist() == [list(cell) for cell in BANNED]


def test_a_run_of_the_row_before_is_noticed() -> None:
    state = state_of()
    state.outputs.copy_(state.outputs.roll(1, 0))
    ours, truth = both(gpu.ban_tokens, reference.ban_tokens, BANS, state)
    assert torch.equal(ours, truth)
    assert (ours == -torch.inf).nonzero().tolist() != [list(cell) for cell in BANNED]


def test_lists_raise_their_tokens_alone() -> None:
    ours, truth = both(gpu.add_to_lists, reference.add_to_lists, sets_of(2, 1, -1, 0, 0), 2.5)
    assert torch.equal(ours, truth) and torch.equal(ours[1], scores_of(PLACES)[1])


PENALTIES = Penalties(
    places=ints(3, 1, 2),
    rows=ints(5, 0, 2),
    repetition=floats(1.3, 0.7, 1.0),
    frequency=floats(0.0, -1.5, 2.0),
    presence=floats(0.5, 0.0, -0.5),
    count=floats(1.0, 0.0, 0.3),
)


def test_penalties_follow_the_counts_of_their_rows() -> None:
    ours, truth = both(gpu.penalise, reference.penalise, PENALTIES, state_of())
    assert torch.allclose(ours, truth, atol=1e-5)
    assert torch.equal(ours[0], scores_of(PLACES)[0])


@pytest.mark.parametrize("fault", ["counts", "num_tokens"])
def test_a_stale_count_is_noticed(fault: str) -> None:
    stale = state_of()
    getattr(stale, fault)[:] += 1
    ours, truth = scores_of(PLACES), scores_of(PLACES)
    gpu.penalise(ours, PENALTIES, stale)
    reference.penalise(truth, PENALTIES, state_of())
    assert not torch.allclose(ours, truth, atol=1e-5)
