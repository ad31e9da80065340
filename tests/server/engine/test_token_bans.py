"""Tokens that a row may not choose: least lengths, allowed tokens and bad words, against a plain loop."""

import pytest
import torch

from loraplex_server.engine.sampled_tokens import NO_TOKEN
from loraplex_server.engine.sampler import Sampler
from loraplex_server.messages import SamplingParams

VOCAB = 40
END, STOP = 3, 7


def make_sampler(num_rows: int = 6) -> Sampler:
    return Sampler(num_rows, VOCAB, torch.device("cpu"), watermark_gamma=0.5, watermark_delta=2.0)


def params(**fields: object) -> SamplingParams:
    return SamplingParams(max_new_tokens=100, **fields)  # type: ignore[arg-type]


def scores(seed: int, num_rows: int = 1) -> torch.Tensor:
    return torch.randn(num_rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * 3


def run(sampling: SamplingParams, num_tokens: int, prompt: list[int] | None = None, output: int = 0) -> list[int]:
    sampler = make_sampler(1)
    sampler.add(0, sampling, prompt or [1], output)
    return [sampler.sample(scores(step), [0]).token_ids[0] for step in range(num_tokens)]


def test_a_token_that_ends_is_not_chosen_before_the_least_length() -> None:
    sampler = make_sampler(1)
    sampler.add(0, params(min_new_tokens=3, held_back_token_ids=(END, STOP)), [1, 2])
    found = []
    for step in range(5):
        logits = scores(step)
        logits[0, END], logits[0, STOP] = 100, 99
        found.append(sampler.sample(logits, [0]).token_ids[0])
    assert END not in found[:3] and STOP not in found[:3]
    assert found[3:] == [END, END]


def test_only_allowed_tokens_are_chosen_greedy_and_drawn() -> None:
    allowed = (5, 17, 30)
    for sampling in (params(allowed_token_ids=allowed), params(allowed_token_ids=allowed, do_sample=True, seed=1)):
        found = run(sampling, 30)
        assert set(found) <= set(allowed)
    greedy = run(params(allowed_token_ids=allowed), 30)
    assert greedy == [max(allowed, key=lambda token_id, step=step: scores(step)[0, token_id]) for step in range(30)]


def expected_without_words(words: tuple[tuple[int, ...], ...], prompt_output: list[int], num_tokens: int) -> list[int]:
    output = list(prompt_output)
    for step in range(num_tokens):
        row = scores(step)[0].tolist()
        order = sorted(range(VOCAB), key=lambda token_id: -row[token_id])
        output.append(next(t for t in order if not any((*output, t)[-len(word) :] == tuple(word) for word in words)))
    return output[len(prompt_output) :]


def test_bad_words_are_never_completed_and_nothing_else_changes() -> None:
    free = run(params(), 25)
    words = ((free[3],), (free[5], free[6]), (free[10], free[11], free[12]), (38, 39))
    found = run(params(bad_words=words), 25)
    assert found == expected_without_words(words, [], 25) != free
    text = tuple(found)
    assert not any(text[i : i + len(word)] == word for word in words for i in range(25))


def test_what_was_generated_before_a_preemption_counts() -> None:
    free = run(params(), 4)
    word = (free[0], free[1])
    whole = run(params(bad_words=(word,), min_new_tokens=2, held_back_token_ids=(free[2],)), 4)
    sampler = make_sampler(1)
    sampling = params(bad_words=(word,), min_new_tokens=2, held_back_token_ids=(free[2],))
    sampler.add(0, sampling, [1, whole[0]], 1)
    assert [sampler.sample(scores(step), [0]).token_ids[0] for step in range(1, 4)] == whole[1:]


def test_the_prompt_is_no_part_of_a_bad_word() -> None:
    free = run(params(), 1, prompt=[1, 9])
    assert run(params(bad_words=((9, free[0]),)), 1, prompt=[1, 9]) == free


def test_rows_without_bans_beside_them_choose_as_they_would_alone() -> None:
    sampler = make_sampler()
    plain, drawn = params(), params(do_sample=True, seed=4, num_logprobs=2)
    for row, sampling in enumerate((plain, params(allowed_token_ids=(2, 4)), drawn, params(bad_words=((1, 2), (3,))))):
        sampler.add(row, sampling, [1])
    alone = make_sampler(1)
    alone.add(0, drawn, [1])
    for step in range(8):
        logits = scores(step, 4)
        together = sampler.sample(logits.clone(), [0, 1, 2, 3])
        assert together.token_ids[0] == int(logits[0].argmax())
        assert together.token_ids[2] == alone.sample(logits[2:3].clone(), [0]).token_ids[0]


def test_a_row_that_may_choose_nothing_is_broken_and_the_others_go_on() -> None:
    sampler = make_sampler()
    sampler.add(0, params(allowed_token_ids=(END,), min_new_tokens=2, held_back_token_ids=(END,)), [1])
    sampler.add(1, params(), [1])
    logits = scores(0, 2)
    assert sampler.sample(logits.clone(), [0, 1]).token_ids == [NO_TOKEN, int(logits[1].argmax())]


def test_a_freed_row_bans_nothing_for_the_next_sequence() -> None:
    sampler = make_sampler(1)
    sampler.add(0, params(allowed_token_ids=(2,)), [1])
    assert sampler.sample(scores(0), [0]).token_ids == [2]
    sampler.remove(0)
    sampler.add(0, params(), [1])
    assert sampler.sample(scores(1), [0]).token_ids == [int(scores(1).argmax())]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_of_any_type_are_cut(dtype: torch.dtype) -> None:
    sampler = make_sampler(1)
    sampler.add(0, params(bad_words=((int(scores(0).argmax()),),)), [1])
    assert sampler.sample(scores(0).to(dtype), [0]).token_ids == [int(scores(0)[0].topk(2).indices[1])]
