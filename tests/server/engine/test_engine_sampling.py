"""A seed decides an answer: the same tokens alone, in any batch, after a preemption, with and without a cached head."""

import random
from pathlib import Path
from typing import Any

import pytest
from engines import EngineBench
from tiny_models import make_peft_adapter, make_tiny_llama

from loraplex_server.messages import TokenOutput

NUM_MIXES = 25
HEAD = list(range(40, 60))
SAMPLINGS: list[dict[str, Any]] = [
    {"do_sample": True},
    {"do_sample": True, "temperature": 0.7, "top_k": 20},
    {"do_sample": True, "temperature": 1.3, "top_p": 0.8, "repetition_penalty": 1.3},
    {"do_sample": True, "typical_p": 0.7, "frequency_penalty": 0.5},
    {"do_sample": True, "watermark": True, "min_p": 0.05},
    {"do_sample": False, "repetition_penalty": 1.5, "presence_penalty": 0.5},
]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> EngineBench:
    folder: Path = tmp_path_factory.mktemp("sampling")
    model = make_tiny_llama(folder / "base", vocab_size=256)
    adapters = {name: make_peft_adapter(folder / name, model, rank=4, seed=n) for n, name in enumerate("ab", start=1)}
    return EngineBench(folder / "base", adapters)


def add(bench: EngineBench, name: str, number: int, seed: int) -> None:
    """Request `number` of a fixed list; its answer may depend on nothing but that and its seed."""
    sampling = SAMPLINGS[number % len(SAMPLINGS)]
    prompt = [*HEAD[: 3 + 5 * (number % 4)], 70 + number]
    bench.add(name, prompt, [None, "a", "b"][number % 3], max_new_tokens=20, ignore_eos=True, seed=seed, **sampling)


def token_ids(outputs: list[TokenOutput]) -> list[int]:
    return [token_id for output in outputs for token_id in output.token_ids]


def alone(bench: EngineBench, number: int, seed: int) -> list[int]:
    bench.start()
    add(bench, "alone", number, seed)
    bench.run()
    return token_ids(bench.outputs["alone"])


def test_a_seeded_answer_is_the_same_in_any_batch_and_after_preemption(bench: EngineBench) -> None:
    numbers = range(2 * len(SAMPLINGS))
    expected = {(number, seed): alone(bench, number, seed) for number in numbers for seed in (0, 2**64 - 1)}
    num_preemptions = 0
    for mix in range(NUM_MIXES):
        rng = random.Random(mix)
        bench.start(
            block_size=4,
            num_kv_blocks=rng.choice([12, 16, 20, 200]),
            max_total_tokens=48,
            max_batch_size=rng.choice([2, 5, 16]),
            max_batch_prefill_tokens=rng.choice([3, 8, 64]),
            prefix_caching=rng.random() < 0.7,
            overlap_steps="on" if mix % 2 else "off",
        )
        drawn = {str(i): (rng.choice(numbers), rng.choice((0, 2**64 - 1))) for i in range(8)}
        for name, (number, seed) in drawn.items():
            add(bench, name, number, seed)
            for _ in range(rng.choice([0, 0, 2])):
                bench.step()
        bench.run()
        num_preemptions += bench.engine.scheduler.num_preemptions
        for name, key in drawn.items():
            assert token_ids(bench.outputs[name]) == expected[key], (mix, name, SAMPLINGS[key[0] % len(SAMPLINGS)])
    assert num_preemptions > NUM_MIXES


def test_another_seed_draws_another_answer(bench: EngineBench) -> None:
    answers = [alone(bench, 0, seed) for seed in range(20)]
    assert len({tuple(answer) for answer in answers}) == 20
