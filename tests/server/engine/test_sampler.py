import math
import random

import msgspec
import pytest
import torch
from transformers.generation import logits_process as reference

from loraplex_server.engine.sampled_tokens import NO_TOKEN
from loraplex_server.engine.sampler import Sampler
from loraplex_server.messages import SamplingParams

CPU = torch.device("cpu")
VOCAB = 300
GAMMA, DELTA = 0.5, 2.0


def make_sampler(num_rows: int = 8, vocab_size: int = VOCAB) -> Sampler:
    return Sampler(num_rows, vocab_size, CPU, watermark_gamma=GAMMA, watermark_delta=DELTA)


def greedy(**fields) -> SamplingParams:
    return SamplingParams(max_new_tokens=100, **fields)


def sampled(**fields) -> SamplingParams:
    return SamplingParams(max_new_tokens=100, do_sample=True, **fields)


def random_logits(num_rows: int, seed: int = 0, vocab_size: int = VOCAB) -> torch.Tensor:
    return torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * 3


class FakeModel:
    """Logits that depend on the tokens of a sequence and on nothing else."""

    def logits(self, token_ids: list[int]) -> torch.Tensor:
        seed = hash(tuple(token_ids)) % (2**31)
        return torch.randn(VOCAB, generator=torch.Generator().manual_seed(seed)) * 2


MODEL = FakeModel()
MIXED_PARAMS = [
    greedy(),
    greedy(num_logprobs=3),
    greedy(repetition_penalty=1.3),
    greedy(watermark=True),
    sampled(seed=1),
    sampled(seed=1, temperature=0.5),
    sampled(seed=2**64 - 1, top_k=5),
    sampled(seed=3, top_p=0.8, num_logprobs=2),
    sampled(seed=4, typical_p=0.7),
    sampled(seed=5, min_p=0.2),
    sampled(seed=6, temperature=1.7, top_k=40, top_p=0.9, repetition_penalty=1.1, frequency_penalty=0.5),
    sampled(seed=7, watermark=True, presence_penalty=0.4),
]


def run_alone(params: SamplingParams, prompt: list[int], num_tokens: int) -> list[int]:
    sampler = make_sampler(1)
    sampler.add(0, params, prompt)
    token_ids = list(prompt)
    for _ in range(num_tokens):
        token_ids += sampler.sample(MODEL.logits(token_ids)[None], [0]).token_ids
    return token_ids[len(prompt) :]


# Greedy rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_rows", [1, 5])
def test_a_greedy_row_takes_the_first_of_the_best_tokens_and_its_log_softmax(dtype, num_rows):
    logits = random_logits(num_rows).to(dtype)
    logits[0, 250] = logits[0].max()  # a tie: bfloat16 has many
    sampler = make_sampler()
    rows = list(range(num_rows))
    for row in rows:
        sampler.add(row, greedy(temperature=0.3, top_k=2), [1])
    result = sampler.sample(logits, rows)
    expected = logits.float().log_softmax(1)
    assert result.token_ids == logits.float().argmax(1).tolist()
    torch.testing.assert_close(torch.tensor(result.logprobs), expected.amax(1))
    assert result.top_logprobs == [[] for _ in rows]


def test_top_logprobs_come_for_the_rows_that_ask_and_start_with_the_greedy_token():
    logits = random_logits(3).bfloat16()
    sampler = make_sampler()
    for row, count in enumerate([0, 5, 2]):
        sampler.add(row, greedy(num_logprobs=count), [1])
    result = sampler.sample(logits, [0, 1, 2])
    assert [len(top) for top in result.top_logprobs] == [0, 5, 2]
    for row in (1, 2):
        best = result.top_logprobs[row][0]
        assert (best.token_id, best.logprob) == (result.token_ids[row], result.logprobs[row])


def test_logits_are_not_changed():
    logits = random_logits(len(MIXED_PARAMS))
    before = logits.clone()
    sampler = make_sampler(len(MIXED_PARAMS))
    for row, params in enumerate(MIXED_PARAMS):
        sampler.add(row, params, [1, 2])
    sampler.sample(logits, list(range(len(MIXED_PARAMS))))
    assert torch.equal(logits, before)


def test_an_empty_batch_gives_nothing():
    result = make_sampler().sample(torch.empty(0, VOCAB), [])
    assert (result.token_ids, result.logprobs, result.top_logprobs) == ([], [], [])


# The processed scores, all parameters together


def processed_by_transformers(
    params: SamplingParams, token_ids: list[int], num_prompt: int, logits: torch.Tensor
) -> torch.Tensor:
    """Log-probabilities after transformers' own processors in TGI's order, OpenAI's before and behind them."""
    ids, scores = torch.tensor([token_ids]), logits[None].float()
    for token_id, bias in params.logit_bias.items():
        scores[0, token_id] += bias
    chain = []
    if params.watermark:
        chain.append(reference.WatermarkLogitsProcessor(VOCAB, "cpu", greenlist_ratio=GAMMA, bias=DELTA))
    chain.append(reference.RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
    for processor in chain:
        scores = processor(ids, scores)
    counts = torch.bincount(ids[0], minlength=VOCAB)
    scores = scores - params.frequency_penalty * counts / len(token_ids)
    scores = scores - params.count_penalty * torch.bincount(ids[0, num_prompt:], minlength=VOCAB)
    warpers = []
    if params.do_sample:
        warpers.append(reference.TemperatureLogitsWarper(params.temperature))
        if params.top_k:
            warpers.append(reference.TopKLogitsWarper(params.top_k))
        if params.top_p < 1:
            warpers.append(reference.TopPLogitsWarper(params.top_p))
        if params.min_p > 0:
            warpers.append(reference.MinPLogitsWarper(params.min_p))
        if params.typical_p < 1:
            warpers.append(reference.TypicalLogitsWarper(params.typical_p))
    for warper in warpers:
        scores = warper(ids, scores)
    return scores.log_softmax(1)[0]


def test_every_mix_of_parameters_gives_the_distribution_of_transformers_processors():
    choose = random.Random(0)
    num_rows = 60
    sampler = make_sampler(num_rows)
    sequences: list[list[int]] = []
    all_params: list[SamplingParams] = []
    for row in range(num_rows):
        params = SamplingParams(
            max_new_tokens=9,
            do_sample=choose.random() < 0.8,
            temperature=choose.choice([0.3, 1.0, 1.0, 2.5]),
            top_k=choose.choice([0, 0, 1, 20, 100, 1000]),
            top_p=choose.choice([1.0, 1.0, 0.2, 0.95]),
            typical_p=choose.choice([1.0, 1.0, 0.3, 0.9]),
            min_p=choose.choice([0.0, 0.0, 0.05]),
            repetition_penalty=choose.choice([1.0, 1.0, 0.8, 1.4]),
            frequency_penalty=choose.choice([0.0, 0.0, -1.5, 2.0]),
            count_penalty=choose.choice([0.0, 0.0, -1.5, 2.0]),
            logit_bias=choose.choice([{}, {}, {3: 5.0, VOCAB - 1: -100.0}]),
            watermark=choose.random() < 0.2,
            seed=row,
            num_logprobs=VOCAB,
        )
        sequences.append([choose.randrange(VOCAB) for _ in range(choose.randint(1, 30))])
        all_params.append(params)
        sampler.add(row, params, sequences[row])
    num_prompts = [len(sequence) for sequence in sequences]
    for step in range(4):
        rows = list(range(num_rows)) if step % 2 else choose.sample(range(num_rows), num_rows // 2)
        logits = random_logits(len(rows), seed=step)
        result = sampler.sample(logits, rows)
        for position, row in enumerate(rows):
            expected = processed_by_transformers(
                all_params[row], sequences[row], num_prompts[row], logits[position].clone()
            )
            actual = torch.full((VOCAB,), -torch.inf)
            for top in result.top_logprobs[position]:
                actual[top.token_id] = top.logprob
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
            token_id = result.token_ids[position]
            assert result.logprobs[position] == actual[token_id].item()
            sequences[row].append(token_id)


def test_a_temperature_of_almost_zero_is_greedy():
    logits = random_logits(2)
    sampler = make_sampler()
    sampler.add(0, sampled(temperature=1e-300), [1])
    sampler.add(1, sampled(temperature=1e-40, top_p=0.5, typical_p=0.5, min_p=0.5, top_k=9), [1])
    result = sampler.sample(logits, [0, 1])
    assert result.token_ids == logits.argmax(1).tolist()
    assert result.logprobs == [0.0, 0.0]


# The distribution of the draws


@pytest.mark.parametrize(
    "params",
    [
        sampled(),
        sampled(temperature=0.6),
        sampled(temperature=2.0),
        sampled(top_k=7),
        sampled(top_p=0.8),
        sampled(typical_p=0.6),
        sampled(min_p=0.1),
        sampled(temperature=1.5, top_k=30, top_p=0.9, typical_p=0.95, min_p=0.01),
    ],
    ids=["plain", "cold", "hot", "top_k", "top_p", "typical_p", "min_p", "all"],
)
@pytest.mark.parametrize("over", ["seeds", "positions"])
def test_draws_follow_the_processed_distribution(params, over):
    vocab_size, num_rows, num_steps = 40, 100, 200
    logits = random_logits(1, seed=3, vocab_size=vocab_size) * 0.7
    sampler = make_sampler(num_rows, vocab_size)
    counts = torch.zeros(vocab_size)
    rows = list(range(num_rows))
    for row in rows:
        # A seed for each row, and 200 positions of it; or consecutive positions of one seed, 200 a row.
        seed, position = (row, 0) if over == "seeds" else (9, row * num_steps)
        fields = {"seed": seed, "num_logprobs": vocab_size}
        sampler.add(row, msgspec.structs.replace(params, **fields), [1] * (position + 1), position)
    for _ in range(num_steps):
        result = sampler.sample(logits.expand(num_rows, -1), rows)
        counts += torch.bincount(torch.tensor(result.token_ids), minlength=vocab_size)
    probs = torch.zeros(vocab_size)
    for top in result.top_logprobs[0]:
        probs[top.token_id] = math.exp(top.logprob)
    kept = probs > 0
    assert counts[~kept].sum() == 0
    expected = probs[kept] * counts.sum()
    frequent = expected >= 5
    chi_square = ((counts[kept] - expected)[frequent] ** 2 / expected[frequent]).sum().item()
    degrees = max(int(frequent.sum()) - 1, 1)
    assert chi_square < degrees + 5 * math.sqrt(2 * degrees)


# Reproducibility


def test_the_same_seed_gives_the_same_tokens_in_any_batch_row_and_order():
    choose = random.Random(1)
    prompts = [[choose.randrange(VOCAB) for _ in range(choose.randint(1, 9))] for _ in MIXED_PARAMS]
    num_tokens = 12
    expected = [run_alone(p, prompt, num_tokens) for p, prompt in zip(MIXED_PARAMS, prompts, strict=True)]

    for _ in range(3):
        num_rows = len(MIXED_PARAMS) + 4
        sampler = make_sampler(num_rows)
        rows = choose.sample(range(num_rows), len(MIXED_PARAMS))
        outputs: list[list[int]] = [[] for _ in MIXED_PARAMS]
        for i, params in enumerate(MIXED_PARAMS):
            sampler.add(rows[i], params, prompts[i])
        while any(len(output) < num_tokens for output in outputs):
            running = [i for i, output in enumerate(outputs) if len(output) < num_tokens]
            batch = choose.sample(running, choose.randint(1, len(running)))
            for i in batch:
                if choose.random() < 0.1:  # preempted, and back in the same row with what it had
                    sampler.remove(rows[i])
                    sampler.add(rows[i], MIXED_PARAMS[i], prompts[i] + outputs[i], len(outputs[i]))
            logits = torch.stack([MODEL.logits(prompts[i] + outputs[i]) for i in batch])
            result = sampler.sample(logits, [rows[i] for i in batch])
            for i, token_id in zip(batch, result.token_ids, strict=True):
                outputs[i].append(token_id)
        assert outputs == expected


def test_another_seed_gives_other_tokens():
    assert run_alone(sampled(seed=1), [1], 20) != run_alone(sampled(seed=2), [1], 20)


def test_one_seed_gives_new_draws_at_each_position():
    sampler = make_sampler()
    sampler.add(0, sampled(seed=1), [1])
    logits = torch.zeros(1, VOCAB)
    drawn = [sampler.sample(logits, [0]).token_ids[0] for _ in range(50)]
    assert len(set(drawn)) > 25


def test_greedy_rows_are_the_same_beside_any_neighbours():
    logits = random_logits(8)
    alone = make_sampler()
    alone.add(0, greedy(), [1])
    expected = alone.sample(logits[:1], [0])
    beside = make_sampler()
    beside.add(0, greedy(), [1])
    for row in range(1, 8):
        beside.add(row, MIXED_PARAMS[row + 3], [row])
    result = beside.sample(logits, list(range(8)))
    assert result.token_ids[0] == expected.token_ids[0]
    assert result.logprobs[0] == pytest.approx(expected.logprobs[0], abs=1e-5)


def test_a_reused_row_remembers_nothing_of_the_sequence_before():
    logits = random_logits(1)
    for before in MIXED_PARAMS:
        for after in MIXED_PARAMS:
            fresh = make_sampler(2)
            fresh.add(0, after, [5, 6, 7])
            reused = make_sampler(2)
            reused.add(0, before, list(range(40)))
            reused.sample(logits, [0])
            reused.remove(0)
            reused.add(0, after, [5, 6, 7])
            assert reused.sample(logits, [0]) == fresh.sample(logits, [0])
            assert reused.sample(logits, [0]) == fresh.sample(logits, [0])


def test_sequences_can_be_added_outside_of_inference_mode_and_sampled_inside():
    sampler, plain = make_sampler(), make_sampler()
    params = sampled(repetition_penalty=1.2)
    logits = random_logits(3)
    for row in range(3):
        sampler.add(row, params, list(range(20 * row + 1)))
        plain.add(row, params, list(range(20 * row + 1)))
        for _ in range(30):
            with torch.inference_mode():
                result = sampler.sample(logits[: row + 1], list(range(row + 1)))
            assert result == plain.sample(logits[: row + 1], list(range(row + 1)))


# Broken logits


@pytest.mark.parametrize("damage", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("broken", range(len(MIXED_PARAMS)))
def test_broken_logits_cost_only_their_own_row(damage, broken):
    num_rows = len(MIXED_PARAMS)
    rows = list(range(num_rows))
    sound, hurt = make_sampler(num_rows), make_sampler(num_rows)
    for row, params in enumerate(MIXED_PARAMS):
        sound.add(row, params, [1, 2, 3])
        hurt.add(row, params, [1, 2, 3])
    logits = random_logits(num_rows)
    damaged = logits.clone()
    if damage == -torch.inf:
        damaged[broken] = damage  # single ones are a mask
    else:
        damaged[broken, 17] = damage
    expected = sound.sample(logits, rows)
    result = hurt.sample(damaged, rows)
    assert result.token_ids[broken] == NO_TOKEN
    assert result.logprobs[broken] == 0
    assert result.top_logprobs[broken] == []
    for row in rows:
        if row != broken:
            assert result.token_ids[row] == expected.token_ids[row]
            assert result.top_logprobs[row] == expected.top_logprobs[row]


def test_a_row_whose_logits_were_broken_stays_where_it_was():
    logits = random_logits(1)
    params = sampled(seed=3, repetition_penalty=1.5, watermark=True)
    sampler, fresh = make_sampler(), make_sampler()
    sampler.add(0, params, [1, 2])
    fresh.add(0, params, [1, 2])
    assert sampler.sample(torch.full((1, VOCAB), torch.nan), [0]).token_ids == [NO_TOKEN]
    assert [sampler.sample(logits, [0]) for _ in range(3)] == [fresh.sample(logits, [0]) for _ in range(3)]


def test_tokens_masked_with_minus_infinity_are_never_drawn():
    logits = torch.full((4, VOCAB), -torch.inf)
    logits[:, [3, 8]] = 0.0
    sampler = make_sampler()
    for row, params in enumerate([greedy(), sampled(), sampled(top_p=0.9), sampled(typical_p=0.9)]):
        sampler.add(row, params, [1])
    for _ in range(20):
        assert set(sampler.sample(logits, [0, 1, 2, 3]).token_ids) <= {3, 8}


# Log-probabilities of the prompt


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_tokens", [0, 1, 63, 64, 65, 200])
def test_prompt_logprobs_are_the_log_softmax_of_the_raw_logits(dtype, num_tokens):
    logits = random_logits(num_tokens).to(dtype)
    token_ids = [(i * 37) % VOCAB for i in range(num_tokens)]
    expected = logits.float().log_softmax(1)[range(num_tokens), token_ids]
    actual = make_sampler().prompt_logprobs(logits, token_ids)
    torch.testing.assert_close(torch.tensor(actual), expected)
