"""The first promise on a real language model: whatever else is in the batch, an answer is that of its adapter alone.

The demo's SmolLM2 in float32 with the three adapters of the repository; prompts are chats that share the system head.
"""

import random
from collections import Counter
from collections.abc import Iterator

import pytest
import torch
from demo_server import CHAT
from engines import EngineBench
from mixes import MixRequest, play
from tokenizers import Tokenizer
from transformers import LlamaForCausalLM
from truth import Truth

from loraplex import demo

NUM_MIXES = 12
END_TOKEN = 2
QUESTIONS = (
    "Tell me about cats.",
    "What do bees make?",
    "Why is the sky blue?",
    "Who was Isaac Newton?",
    "How do I boil an egg?",
    "Write one line about the sea.",
    "Is 7 a prime number?",
    "Translate «good morning» into French and Spanish, and say which one is closer to Latin.",
)
VOICES = (None, "pirate", "json", "shout")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def world() -> tuple[EngineBench, Truth, list[list[int]]]:
    folder = demo.prepare()
    adapters = {voice: demo.EXAMPLES / voice for voice in VOICES if voice}
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    prompts = [tokenizer.encode(CHAT.format(question)).ids for question in QUESTIONS]
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return EngineBench(folder, adapters), Truth(model, adapters), prompts


def run_mix(
    bench: EngineBench, truth: Truth, prompts: list[list[int]], seed: int
) -> tuple[list[str], Counter[str], set[str | None]]:
    """One random mix; returns what is wrong with its answers, what happened on the way, and who was asked."""
    rng = random.Random(seed)
    bench.start(
        block_size=8,
        num_kv_blocks=rng.choice([12, 12, 14, 120]),
        max_total_tokens=96,
        max_batch_size=rng.choice([3, 8]),
        max_batch_prefill_tokens=rng.choice([16, 48, 256]),
        max_resident_adapters=rng.randint(1, 3),
    )
    asked: set[str | None] = set()

    def requests() -> Iterator[MixRequest]:
        for _ in range(rng.randint(4, 7)):
            voice = rng.choice(VOICES)
            asked.add(voice)
            yield MixRequest(rng.choice(prompts), voice, rng.choice([1, 12, 24, 24]), ignore_eos=rng.random() < 0.3)

    return *play(bench, truth, rng, requests(), {END_TOKEN}), asked


def test_every_answer_of_smollm2_is_that_of_its_adapter_alone(
    world: tuple[EngineBench, Truth, list[list[int]]],
) -> None:
    happened: Counter[str] = Counter()
    asked: set[str | None] = set()
    for seed in range(NUM_MIXES):
        objections, counts, voices = run_mix(*world, seed)
        assert not objections, (seed, objections)
        happened += counts
        asked |= voices
    print(f"\n{dict(happened)}")
    # The property says little unless the hard cases did occur.
    assert asked == set(VOICES)
    assert happened["answers"] > 3 * NUM_MIXES and happened["prefix_hits"] and happened["preemptions"]
