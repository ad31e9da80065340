"""Activated LoRA: it acts from the last occurrence of its invocation on, and shares the base's blocks before it."""

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from engines import EngineBench
from tiny_models import SEVEN_LINEARS, make_peft_adapter, make_tiny_llama
from truth import Truth

from loraplex_server.engine.batch_builder import _segments
from loraplex_server.engine.sequence import Sequence, last_occurrence, new_sequence
from loraplex_server.engine.step import ScheduledSequence
from loraplex_server.messages import GenerateRequest, SamplingParams

WAKE, OTHER_WAKE = [401, 402], [403]
BLOCK = 8


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[EngineBench, Truth]]:
    folder = tmp_path_factory.mktemp("activated")
    model = make_tiny_llama(folder / "model")
    adapters: dict[str, Path] = {}
    for seed, (name, wake) in enumerate({"woken": WAKE, "other": OTHER_WAKE, "plain": None}.items()):
        fields = {} if wake is None else {"alora_invocation_tokens": wake}
        targets = SEVEN_LINEARS if wake is None else (*SEVEN_LINEARS[:4], "down_proj")
        adapters[name] = make_peft_adapter(folder / name, model, seed=seed, target_modules=targets, **fields)
    yield EngineBench(folder / "model", adapters), Truth(model, adapters)


def words(count: int, seed: int) -> list[int]:
    return torch.randint(3, 400, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


PROMPTS = {
    "in the middle": [*words(21, 1), *WAKE, *words(9, 2)],
    "first": [*WAKE, *words(12, 3)],
    "last": [*words(30, 4), *WAKE],
    "on a block's border": [*words(BLOCK * 2, 5), *WAKE, *words(3, 6)],
    "over a block's border": [*words(BLOCK * 2 - 1, 5), *WAKE, *words(3, 6)],
    "twice": [*words(11, 7), *WAKE, *words(14, 8), *WAKE, *words(5, 9)],
    "half of it": [*words(11, 7), WAKE[0], *words(5, 9)],
    "nowhere": words(25, 10),
    "the other's too": [*words(9, 11), *OTHER_WAKE, *words(20, 12), *WAKE, *words(4, 13)],
}


@pytest.mark.parametrize("prefill", [512, 11, 4])
def test_every_prompt_is_answered_as_peft_does_in_mixed_batches(prefill: int, bench: tuple[EngineBench, Truth]) -> None:
    engines, truth = bench
    engines.start(block_size=BLOCK, num_kv_blocks=256, max_batch_prefill_tokens=prefill)
    draw = random.Random(prefill)
    requests = {
        f"{place}/{adapter}": (prompt, adapter)
        for place, prompt in PROMPTS.items()
        for adapter in ("woken", "other", "plain", None)
    }
    for name in draw.sample(list(requests), len(requests)):
        prompt, adapter = requests[name]
        engines.add(name, prompt, adapter, max_new_tokens=6, ignore_eos=True)
        for _ in range(draw.choice((0, 0, 1, 3))):
            engines.step()
    engines.run()
    objections = {
        name: objection
        for name, (prompt, adapter) in requests.items()
        if (objection := truth.objection(adapter, prompt, engines.answer(name), set()))
    }
    assert not objections
    assert engines.engine.blocks.num_used == 0 and engines.engine.adapters.num_pins == 0


def test_the_base_and_all_activated_adapters_share_the_blocks_before_the_invocation(
    bench: tuple[EngineBench, Truth],
) -> None:
    engines, truth = bench
    engines.start(block_size=BLOCK, num_kv_blocks=256)
    head = words(5 * BLOCK, 20)
    asked = {
        "base": (head, None),
        "woken": ([*head, *WAKE, *words(9, 21)], "woken"),
        "other": ([*head, *OTHER_WAKE, *words(9, 22)], "other"),
        "base again": ([*head, *words(4, 23)], None),
        "plain": ([*head, *words(4, 24)], "plain"),
    }
    for name, (prompt, adapter) in asked.items():
        engines.add(name, prompt, adapter, max_new_tokens=3, ignore_eos=True)
        engines.run()
        assert truth.objection(adapter, prompt, engines.answer(name), set()) is None
    cached = {name: engines.outputs[name][0].num_cached_tokens for name in asked}
    assert cached == {"base": 0, "woken": 5 * BLOCK, "other": 5 * BLOCK, "base again": 5 * BLOCK, "plain": 0}


def test_a_further_turn_computes_anew_what_its_last_turn_had_awake(bench: tuple[EngineBench, Truth]) -> None:
    engines, truth = bench
    engines.start(block_size=BLOCK, num_kv_blocks=256)
    prompt = [*words(2 * BLOCK, 30), *WAKE, *words(BLOCK, 31)]
    for turn in range(3):
        engines.add(str(turn), prompt, "woken", max_new_tokens=BLOCK, ignore_eos=True)
        engines.run()
        answer = engines.answer(str(turn))
        assert truth.objection("woken", prompt, answer, set()) is None
        prompt = [*prompt, *answer.token_ids, *words(5, 40 + turn), *WAKE, *words(3, 50 + turn)]
    # The head before the first invocation is the base's in every turn.
    assert engines.outputs["1"][0].num_cached_tokens == 2 * BLOCK


def sequence(prompt: list[int], digest: str | None, wake: tuple[int, ...] = ()) -> Sequence:
    request = GenerateRequest(
        request_id="r", prompt_token_ids=prompt, sampling=SamplingParams(max_new_tokens=1), adapter_digest=digest
    )
    return new_sequence(request, 0, wake)


def test_the_names_of_blocks_differ_from_the_invocation_on_and_not_before() -> None:
    prompt = [*words(2 * BLOCK + 3, 60), *WAKE, *words(3 * BLOCK, 61)]
    wake = tuple(WAKE)
    base = sequence(prompt, None).hashes(5, BLOCK)
    woken = sequence(prompt, "a", wake).hashes(5, BLOCK)
    other = sequence(prompt, "b", wake).hashes(5, BLOCK)
    plain = sequence(prompt, "a").hashes(5, BLOCK)
    assert woken[:2] == other[:2] == base[:2]
    assert len({*base, *woken[2:], *other[2:], *plain}) == 5 + 3 + 3 + 5


def test_the_same_block_awake_from_another_position_has_another_name() -> None:
    twice = [*WAKE, 7, 8, 9, WAKE[0], WAKE[1], 10, *words(BLOCK, 62)]
    # The second occurrence ends beyond the block, so the block's own tokens do not tell which one woke the adapter.
    over = [*WAKE, 7, 8, 9, 10, 11, WAKE[0], WAKE[1], *words(BLOCK, 62)]
    early = [*over[:BLOCK], 300, *words(BLOCK, 62)]
    wake = tuple(WAKE)
    assert sequence(twice, "a", wake).adapter_start == 5
    assert (sequence(over, "a", wake).adapter_start, sequence(early, "a", wake).adapter_start) == (7, 0)
    assert sequence(over, "a", wake).hashes(1, BLOCK) != sequence(early, "a", wake).hashes(1, BLOCK)


def test_a_prompt_without_the_invocation_is_the_bases() -> None:
    asleep = sequence(words(20, 63), "a", (401, 402))
    assert asleep.request.adapter_digest is None
    assert asleep.hashes(2, BLOCK) == sequence(words(20, 63), None).hashes(2, BLOCK)


@pytest.mark.parametrize(
    ("tokens", "wanted", "start"),
    [
        ([1, 2, 3, 1, 2], [1, 2], 3),
        ([1, 1, 1], [1, 1], 1),
        ([1, 2], [1, 2], 0),
        ([2, 1], [1, 2], None),
        ([], [1], None),
    ],
)
def test_the_last_occurrence_is_found(tokens: list[int], wanted: list[int], start: int | None) -> None:
    assert last_occurrence(tokens, wanted) == start


def chunk(slot: int, count: int, num_base: int = 0) -> ScheduledSequence:
    return ScheduledSequence(
        row=0, token_ids=[0] * count, start=0, new_block_ids=[], slot=slot, samples=False, num_base_tokens=num_base
    )


@pytest.mark.parametrize(
    ("sequences", "borders", "slots"),
    [
        ([chunk(2, 5, 3)], (0, 3, 5), (-1, 2)),
        ([chunk(2, 5, 5), chunk(2, 4)], (0, 5, 9), (-1, 2)),
        ([chunk(-1, 4), chunk(2, 5, 3), chunk(2, 5, 1)], (0, 7, 9, 10, 14), (-1, 2, -1, 2)),
        ([chunk(1, 1), chunk(2, 3)], (0, 1, 4), (1, 2)),
    ],
)
def test_a_chunk_is_cut_where_its_adapter_wakes(
    sequences: list[ScheduledSequence], borders: tuple[int, ...], slots: tuple[int, ...]
) -> None:
    assert _segments(sequences) == (borders, slots)
