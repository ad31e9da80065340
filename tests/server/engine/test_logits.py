import pytest
import torch
from transformers.generation import logits_process as reference

from loraplex_server.engine import logits as processors

ROWS, VOCAB = 6, 500
KEPT = -torch.inf


@pytest.fixture
def scores() -> torch.Tensor:
    return torch.randn(ROWS, VOCAB, generator=torch.Generator().manual_seed(0)) * 3


def by_row(scores: torch.Tensor, make, values: list) -> torch.Tensor:
    """transformers' processor of each row's own value, row by row."""
    no_ids = torch.zeros(1, 1, dtype=torch.int64)
    return torch.cat([make(value)(no_ids, scores[i : i + 1]) for i, value in enumerate(values)])


def test_top_k_equals_transformers(scores):
    top_k = [1, 2, 10, 499, 500, 77]
    expected = by_row(scores, reference.TopKLogitsWarper, top_k)
    processors.keep_top(scores, torch.tensor(top_k), torch.ones(ROWS))
    assert torch.equal(scores, expected)


def test_top_p_equals_transformers(scores):
    top_p = [0.001, 0.1, 0.5, 0.9, 0.99, 0.9999]
    expected = by_row(scores, reference.TopPLogitsWarper, top_p)
    processors.keep_top(scores, torch.full((ROWS,), VOCAB), torch.tensor(top_p))
    assert torch.equal(scores, expected)


def test_top_p_is_taken_of_what_top_k_left(scores):
    top_k, top_p = [3, 10, 50, 100, 400, 500], [0.3, 0.9, 0.5, 0.8, 0.95, 0.7]
    expected = by_row(by_row(scores, reference.TopKLogitsWarper, top_k), reference.TopPLogitsWarper, top_p)
    processors.keep_top(scores, torch.tensor(top_k), torch.tensor(top_p))
    assert torch.equal(scores, expected)


def test_top_p_of_one_and_top_k_of_the_vocabulary_change_nothing(scores):
    scores[0] *= 100  # most probabilities are 0 in float32
    before = scores.clone()
    processors.keep_top(scores, torch.full((ROWS,), VOCAB), torch.ones(ROWS))
    assert torch.equal(scores, before)


def test_min_p_equals_transformers(scores):
    min_p = [0.9, 0.5, 0.1, 0.01, 1e-4, 1.0]
    expected = by_row(scores, reference.MinPLogitsWarper, min_p)
    processors.keep_min_p(scores, torch.tensor(min_p))
    assert torch.equal(scores, expected)


def test_typical_p_equals_transformers(scores):
    scores[4, 100:] = KEPT  # as after another cut
    typical_p = [0.01, 0.2, 0.5, 0.9, 0.95, 0.999]
    expected = by_row(scores, reference.TypicalLogitsWarper, typical_p)
    processors.keep_typical(scores, torch.tensor(typical_p))
    assert torch.equal(scores, expected)


def test_all_tokens_that_tie_with_the_last_one_kept_are_kept():
    scores = torch.tensor([[5.0, 4, 4, 4, 1], [5.0, 4, 4, 4, 1]])
    processors.keep_top(scores, torch.tensor([2, 5]), torch.tensor([1.0, 0.6]))
    assert scores.isfinite().tolist() == [[True, True, True, True, False]] * 2


def test_a_cut_always_leaves_the_best_token():
    scores = torch.tensor([[0.0, 0, 0, 0], [0, 1e4, 0, 0]])
    best = scores.argmax(1)
    processors.keep_top(scores, torch.tensor([1, 1]), torch.tensor([1e-6, 1e-6]))
    processors.keep_min_p(scores, torch.tensor([1.0, 1.0]))
    processors.keep_typical(scores, torch.tensor([1e-6, 1e-6]))
    assert scores.gather(1, best[:, None]).isfinite().all()


def penalise(scores, token_ids, *, prompt_lengths=None, repetition=1.0, frequency=0.0, presence=0.0, count=None):
    lengths = [len(ids) for ids in token_ids]
    junk = 3  # what stands behind a row's tokens is not read
    padded = torch.full((len(token_ids), max(lengths)), junk)
    for row, ids in enumerate(token_ids):
        padded[row, : len(ids)] = torch.tensor(ids)
    per_row = torch.ones(len(token_ids))
    processors.penalise(
        scores,
        padded,
        torch.tensor(lengths),
        torch.tensor(prompt_lengths or lengths),
        repetition * per_row,
        frequency * per_row,
        presence * per_row,
        None if count is None else count * per_row,
    )


TOKEN_IDS = [[1], [1, 1, 1], [0, 499, 7, 7, 0], list(range(100, 200)), [9] * 50, [498, 2]]


@pytest.mark.parametrize("penalty", [0.5, 1.0, 1.2, 3.0])
def test_repetition_penalty_equals_transformers(scores, penalty):
    expected = scores.clone()
    for row, ids in enumerate(TOKEN_IDS):
        processor = reference.RepetitionPenaltyLogitsProcessor(penalty)
        expected[row : row + 1] = processor(torch.tensor([ids]), scores[row : row + 1])
    penalise(scores, TOKEN_IDS, repetition=penalty)
    assert torch.equal(scores, expected)


@pytest.mark.parametrize("penalty", [-2.0, 0.7, 2.0])
def test_frequency_penalty_is_the_tokens_share_of_prompt_and_output(scores, penalty):
    expected = scores.clone()
    for row, ids in enumerate(TOKEN_IDS):
        expected[row] -= penalty * torch.bincount(torch.tensor(ids), minlength=VOCAB) / len(ids)
    penalise(scores, TOKEN_IDS, frequency=penalty)
    torch.testing.assert_close(scores, expected)


def test_presence_penalty_counts_each_output_token_once_and_no_prompt_token(scores):
    prompt_lengths = [1, 1, 3, 50, 49, 2]
    expected = scores.clone()
    for row, (ids, prompt_length) in enumerate(zip(TOKEN_IDS, prompt_lengths, strict=True)):
        for token_id in set(ids[prompt_length:]):
            expected[row, token_id] -= 1.5
    penalise(scores, TOKEN_IDS, prompt_lengths=prompt_lengths, presence=1.5)
    torch.testing.assert_close(scores, expected)


@pytest.mark.parametrize("penalty", [-2.0, 0.7])
def test_openais_frequency_penalty_counts_each_output_token_and_no_prompt_token(scores, penalty):
    prompt_lengths = [1, 1, 3, 50, 10, 2]
    expected = scores.clone()
    for row, (ids, prompt_length) in enumerate(zip(TOKEN_IDS, prompt_lengths, strict=True)):
        expected[row] -= penalty * torch.bincount(torch.tensor(ids[prompt_length:]).long(), minlength=VOCAB)
    penalise(scores, TOKEN_IDS, prompt_lengths=prompt_lengths, count=penalty)
    torch.testing.assert_close(scores, expected)


def test_frequency_comes_after_repetition():
    scores = torch.tensor([[2.0, -2.0, 1.0]])
    penalise(scores, [[0, 1]], repetition=2.0, frequency=1.0)
    assert scores.tolist() == [[2 / 2 - 0.5, -2 * 2 - 0.5, 1.0]]


@pytest.mark.parametrize("gamma", [0.25, 0.5])
def test_watermark_equals_transformers(scores, gamma):
    previous = [0, 1, 17, 499, 17, 250]
    processor = reference.WatermarkLogitsProcessor(VOCAB, "cpu", greenlist_ratio=gamma, bias=1.5)
    expected = processor(torch.tensor(previous)[:, None], scores)
    processors.add_watermark(scores, previous, gamma, 1.5)
    assert torch.equal(scores, expected)
    assert torch.equal(scores[2] != 0, scores[4] != 0)


def test_top_tokens_are_best_first_and_exactly_as_many_as_asked():
    logprobs = torch.tensor([[-1.0, -2, -1, -2, -2], [-3.0, -1, -2, -5, -4], [-1.0, -2, -3, -4, -5]])
    found = processors.top_tokens(logprobs, [3, 2, 9])
    assert found == [
        [(0, -1.0), (2, -1.0), (1, -2.0)],
        [(1, -1.0), (2, -2.0)],
        [(0, -1.0), (1, -2.0), (2, -3.0), (3, -4.0), (4, -5.0)],
    ]


def test_top_tokens_leave_out_what_was_cut():
    logprobs = torch.tensor([[-0.5, -torch.inf, -0.9, -torch.inf]])
    assert [token_id for token_id, _ in processors.top_tokens(logprobs, [3])[0]] == [0, 2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_copy_as_float_is_exact(dtype):
    values = torch.randn(3, 1000) * 50
    values[0, :4] = torch.tensor([torch.inf, -torch.inf, 0.0, -0.0])
    logits = values.to(dtype)
    out = torch.empty(3, 1000)
    processors.copy_as_float(logits, out)
    assert torch.equal(out, logits.to(torch.float32))


def test_argmax_takes_the_lowest_index_on_ties():
    scores = torch.tensor([[1.0, 3, 3, 2], [0, 0, 0, 0], [-1, torch.nan, 5, torch.nan]])
    assert processors.argmax(scores).tolist() == [1, 0, 1]
    assert processors.argmax(torch.empty(0, 4)).tolist() == []
