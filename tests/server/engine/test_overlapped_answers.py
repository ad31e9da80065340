"""What requests hear with steps in flight: the same as without, whatever they ask for."""

from pathlib import Path
from typing import Any

import pytest
import torch
from engines import EngineBench
from tiny_llm import make_tiny_world

from loraplex_server.engine import batch_builder
from loraplex_server.messages import TokenOutput, TopLogprob
from loraplex_server.text.guide_compiler import grammar_of
from loraplex_server.text.guides import regex_guide

END = 2
PROMPT = [40, 41, 42, 43, 44]
SAMPLINGS: dict[str, dict[str, Any]] = {
    "greedy": {"num_logprobs": 2},
    "red": {"prompt_logprobs": True, "num_prompt_logprobs": 2},
    "blue": {"do_sample": True, "seed": 3, "temperature": 1.3, "top_k": 20, "num_logprobs": 3},
    "repetition": {"repetition_penalty": 1.7},
    "red counts": {"count_penalty": 0.8, "presence_penalty": 0.4, "do_sample": True, "seed": 2**64 - 1, "top_p": 0.9},
    "watermark": {"watermark": True, "do_sample": True, "seed": 5},
    "bad words": {"bad_words": ((60,), (61, 62)), "min_new_tokens": 4, "held_back_token_ids": (END,)},
    "blue grammar": {"guide": grammar_of(regex_guide("r", "[0-9]{3}-[0-9]{2}")), "max_new_tokens": 30},
    "biased": {"logit_bias": {70: 4.0, 71: 4.0}, "stop_token_ids": (71,)},
    "short": {"max_new_tokens": 1},
}


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> EngineBench:
    folder: Path = tmp_path_factory.mktemp("overlap")
    make_tiny_world(folder)
    return EngineBench(folder / "base", {name: folder / name for name in ("red", "blue")})


def play_samplings(bench: EngineBench, **settings: Any) -> dict[str, list[TokenOutput]]:
    """What requests of every kind hear, a few blocks and one slot for two adapters between them."""
    bench.start(block_size=4, num_kv_blocks=16, max_total_tokens=48, max_resident_adapters=1, **settings)
    for number, (name, sampling) in enumerate(SAMPLINGS.items()):
        adapter = name.split()[0] if name.split()[0] in bench.specs else None
        sampling = {"max_new_tokens": 12, "ignore_eos": "guide" not in sampling} | sampling
        bench.add(name, [*PROMPT, 50 + number, 51][: 3 + number % 5], adapter, **sampling)
        bench.step()
    bench.run()
    assert bench.engine.blocks.num_used == 0 and bench.engine.adapters.num_pins == 0
    bench.engine.close()
    return bench.outputs


def likely(tops: list[list[TopLogprob]]) -> list[list[int]]:
    return [[top.token_id for top in of_place] for of_place in tops]


@pytest.mark.parametrize("is_late", [False, True])
def test_each_kind_of_sampling_hears_the_same_with_steps_in_flight(bench: EngineBench, is_late: bool) -> None:
    truth = play_samplings(bench)
    ours = play_samplings(bench, overlap_steps="on", is_late=is_late)
    for name, outputs in truth.items():
        assert [o.error for o in ours[name]] == [None] * len(outputs), name
        assert [o.token_ids for o in ours[name]] == [o.token_ids for o in outputs], name
        assert [o.finish_reason for o in ours[name]] == [o.finish_reason for o in outputs], name
        for mine, other in zip(ours[name], outputs, strict=True):
            assert mine.logprobs == pytest.approx(other.logprobs, abs=1e-4), name
            assert mine.prompt_logprobs == pytest.approx(other.prompt_logprobs, abs=1e-4), name
            for one, same in (
                (mine.top_logprobs, other.top_logprobs),
                (mine.prompt_top_logprobs, other.prompt_top_logprobs),
            ):
                assert [[top.token_id for top in tops] for tops in one] == [
                    [top.token_id for top in tops] for tops in same
                ]


def test_a_planted_stale_token_is_noticed(bench: EngineBench, monkeypatch: pytest.MonkeyPatch) -> None:
    truth = play_samplings(bench)
    plain = batch_builder.put_chosen_tokens
    seen: list[torch.Tensor] = []

    def stale(token_ids: torch.Tensor, token_rows: torch.Tensor, last_token_ids: torch.Tensor) -> None:
        seen.append(last_token_ids.clone())
        plain(token_ids, token_rows, seen[-2:][0])

    monkeypatch.setattr(batch_builder, "put_chosen_tokens", stale)
    ours = play_samplings(bench, overlap_steps="on")
    assert any([o.token_ids for o in ours[name]] != [o.token_ids for o in outputs] for name, outputs in truth.items())
