"""Log-probabilities of prompts and of the likeliest tokens are those of transformers, however a prompt was computed."""

from pathlib import Path

import pytest
from engines import EngineBench
from tiny_models import make_peft_adapter, make_tiny_llama
from truth import TOLERANCE, Truth

BLOCK_SIZE = 4
PROMPT = [7, 9, 11, 250, 3, 3, 3, 19, 44, 101, 5, 6, 88]
NUM_LIKELY = 5


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[EngineBench, Truth]:
    folder: Path = tmp_path_factory.mktemp("logprobs")
    model = make_tiny_llama(folder / "base", vocab_size=256)
    adapters = {"a": make_peft_adapter(folder / "a", model, rank=4)}
    return EngineBench(folder / "base", adapters), Truth(model, adapters)


def assert_right_prompt_logprobs(world: tuple[EngineBench, Truth], name: str, adapter: str | None) -> None:
    bench, truth = world
    said = [output.prompt_logprobs for output in bench.outputs[name] if output.prompt_logprobs is not None]
    (logprobs,) = said  # once, with the first token
    assert bench.outputs[name][0].prompt_logprobs is logprobs
    scores = truth.logprobs(adapter, PROMPT)
    right = [float(scores[i, token_id]) for i, token_id in enumerate(PROMPT[1:])]
    assert logprobs[0] is None
    assert logprobs[1:] == pytest.approx(right, abs=TOLERANCE)


@pytest.mark.parametrize("adapter", [None, "a"])
@pytest.mark.parametrize("chunk", [1, 3, BLOCK_SIZE, 5, len(PROMPT) - 1, len(PROMPT), 100])
def test_a_prompts_logprobs_do_not_depend_on_its_chunks(
    world: tuple[EngineBench, Truth], adapter: str | None, chunk: int
) -> None:
    bench, _ = world
    bench.start(block_size=BLOCK_SIZE, max_batch_prefill_tokens=chunk)
    bench.add("it", PROMPT, adapter, prompt_logprobs=True, max_new_tokens=2)
    bench.add("beside it", PROMPT[::-1], "a")
    bench.run()
    assert_right_prompt_logprobs(world, "it", adapter)


def test_a_cached_head_does_not_take_a_prompts_logprobs_away(world: tuple[EngineBench, Truth]) -> None:
    bench, _ = world
    bench.start(block_size=BLOCK_SIZE)
    bench.add("before", PROMPT)
    bench.run()
    bench.add("it", PROMPT, prompt_logprobs=True)
    bench.add("hits the cache", PROMPT)
    bench.run()
    assert_right_prompt_logprobs(world, "it", None)
    assert bench.outputs["it"][0].num_cached_tokens == 0
    assert bench.outputs["hits the cache"][0].num_cached_tokens == len(PROMPT) // BLOCK_SIZE * BLOCK_SIZE


@pytest.mark.parametrize("chunk", [1, 5, 100])
def test_the_likeliest_tokens_in_a_prompts_places_are_those_of_the_model(
    world: tuple[EngineBench, Truth], chunk: int
) -> None:
    bench, truth = world
    bench.start(block_size=BLOCK_SIZE, max_batch_prefill_tokens=chunk)
    bench.add("it", PROMPT, "a", prompt_logprobs=True, num_prompt_logprobs=NUM_LIKELY, max_new_tokens=2)
    bench.add("beside it", PROMPT, "a", prompt_logprobs=True)
    bench.run()
    first, second = bench.outputs["it"]
    assert second.prompt_top_logprobs == [] == bench.outputs["beside it"][0].prompt_top_logprobs
    assert first.prompt_top_logprobs[0] == []
    scores = truth.logprobs("a", PROMPT)
    assert len(first.prompt_top_logprobs) == len(PROMPT)
    for place, top in enumerate(first.prompt_top_logprobs[1:]):
        values, token_ids = scores[place].topk(NUM_LIKELY)
        assert [entry.token_id for entry in top] == token_ids.tolist()
        assert [entry.logprob for entry in top] == pytest.approx(values.tolist(), abs=TOLERANCE)
    for logprob, token_id, top in zip(
        first.prompt_logprobs[1:], PROMPT[1:], first.prompt_top_logprobs[1:], strict=True
    ):
        same = [entry.logprob for entry in top if entry.token_id == token_id]
        assert same in ([], [logprob])  # the very same number in both places


def test_a_prompt_of_one_token_has_one_unknown_logprob(world: tuple[EngineBench, Truth]) -> None:
    bench, _ = world
    bench.start()
    bench.add("it", [7], prompt_logprobs=True)
    bench.run()
    assert bench.outputs["it"][0].prompt_logprobs == [None]


@pytest.mark.parametrize(("num_kv_blocks", "chunk"), [(6, 1), (7, 13)], ids=["while its prompt is read", "afterwards"])
def test_a_preempted_request_reports_its_prompts_logprobs_once_and_whole(
    world: tuple[EngineBench, Truth], num_kv_blocks: int, chunk: int
) -> None:
    bench, _ = world
    bench.start(block_size=BLOCK_SIZE, num_kv_blocks=num_kv_blocks, max_total_tokens=24, max_batch_prefill_tokens=chunk)
    bench.add("loads the adapter", [7], "a", max_new_tokens=1)
    bench.run()
    bench.add("first", PROMPT[:3], max_new_tokens=20, ignore_eos=True)
    bench.add("it", PROMPT, "a", prompt_logprobs=True, max_new_tokens=10, ignore_eos=True)
    while bench.engine.has_work and not bench.engine.scheduler.num_preemptions:
        bench.step()
    assert bench.engine.scheduler.num_preemptions == 1
    assert bool(bench.outputs["it"]) == (chunk > 1)
    bench.run()
    assert_right_prompt_logprobs(world, "it", "a")
    assert len(bench.answer("it").token_ids) == 10


@pytest.mark.parametrize("adapter", [None, "a"])
def test_the_likeliest_tokens_are_transformers_own_in_order(
    world: tuple[EngineBench, Truth], adapter: str | None
) -> None:
    bench, truth = world
    bench.start()
    bench.add("it", PROMPT, adapter, num_logprobs=NUM_LIKELY, max_new_tokens=6, ignore_eos=True)
    bench.add("wants none", PROMPT[3:], max_new_tokens=6)
    bench.run()
    outputs = bench.outputs["it"]
    scores = truth.logprobs(adapter, PROMPT + bench.answer("it").token_ids)[len(PROMPT) - 1 :]
    assert len(outputs) == 6
    for line, output in zip(scores, outputs, strict=False):
        right = line.topk(NUM_LIKELY)
        (likely,) = output.top_logprobs
        assert [one.token_id for one in likely] == right.indices.tolist()
        assert [one.logprob for one in likely] == pytest.approx(right.values.tolist(), abs=TOLERANCE)
        assert likely[0].token_id == output.token_ids[0]
    assert all(output.top_logprobs == [] for output in bench.outputs["wants none"])
