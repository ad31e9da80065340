"""Grammars in the real engine: what a row with one may write, and that the rows beside it do not notice."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from engines import EngineBench
from tiny_llm import make_tiny_world
from tiny_tokenizer import byte_tokenizer

from loraplex_server.engine import guided
from loraplex_server.engine.logits import keep_allowed
from loraplex_server.text.guide_compiler import grammar_of
from loraplex_server.text.guides import Guide, choice_guide, regex_guide, schema_guide

END = 2
PROMPT = [40, 41, 42, 43, 44]
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 4}, "big": {"type": "boolean"}},
    "required": ["name", "big"],
}
PHONE = r"[0-9]{3}-[0-9]{4}"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("guided")
    make_tiny_world(folder)
    return folder


@pytest.fixture(scope="module")
def bench(world: Path) -> EngineBench:
    return EngineBench(world / "base", {"red": world / "red"})


def grammar(guide: Guide) -> str:
    return grammar_of(guide)


def text_of(bench: EngineBench, request_id: str) -> str:
    answer = bench.answer(request_id)
    assert answer.finish_reason == "eos_token" and answer.token_ids[-1] == END, answer
    return byte_tokenizer().decode(answer.token_ids)


@pytest.mark.parametrize("do_sample", [False, True])
def test_an_answer_follows_its_grammar_and_ends_where_the_grammar_does(bench: EngineBench, do_sample: bool) -> None:
    bench.start()
    common = {"max_new_tokens": 64, "do_sample": do_sample, "seed": 5}
    bench.add("json", PROMPT, guide=grammar(schema_guide("s", SCHEMA, whitespace=None)), **common)
    bench.add("regex", PROMPT, guide=grammar(regex_guide("r", PHONE)), **common)
    bench.add("choice", PROMPT, "red", guide=grammar(choice_guide("c", ["yes", "no"])), **common)
    bench.run()
    found = json.loads(text_of(bench, "json"))
    assert list(found) == ["name", "big"] and isinstance(found["big"], bool) and len(found["name"]) <= 4
    assert re.fullmatch(PHONE, text_of(bench, "regex"))
    assert text_of(bench, "choice") in ("yes", "no")


@pytest.mark.parametrize("guide", [regex_guide("r", "[0-9]{9}-[a-f]{20}"), choice_guide("c", ["x" * 32, "y" * 28])])
def test_a_preempted_sequence_goes_on_in_its_grammar_where_it_was(bench: EngineBench, guide: Guide) -> None:
    def answers(**settings: int) -> tuple[list[list[int]], int]:
        bench.start(**settings)
        for number in range(3):
            prompt = [50 + number] * 17
            bench.add(str(number), prompt, guide=grammar(guide), max_new_tokens=40, do_sample=True, seed=number)
        bench.run()
        return [bench.answer(str(n)).token_ids for n in range(3)], bench.engine.scheduler.num_preemptions

    roomy, none = answers(block_size=4)
    tight, some = answers(block_size=4, num_kv_blocks=16)
    assert none == 0 and some > 0
    assert tight == roomy


def test_rows_beside_a_grammar_get_what_they_get_alone(bench: EngineBench) -> None:
    greedy = {"max_new_tokens": 12, "ignore_eos": True}
    sampled = greedy | {"do_sample": True, "seed": 3, "top_k": 20, "repetition_penalty": 1.2, "num_logprobs": 2}
    bench.start()
    bench.add("greedy", PROMPT, **greedy)
    bench.add("sampled", PROMPT, "red", **sampled)
    bench.run()
    alone = {name: bench.answer(name) for name in ("greedy", "sampled")}
    bench.start()
    bench.add("guided", PROMPT, guide=grammar(schema_guide("s", SCHEMA, whitespace=None)), max_new_tokens=64)
    bench.add("greedy", PROMPT, **greedy)
    bench.add("sampled", PROMPT, "red", **sampled)
    bench.run()
    for name, answer in alone.items():
        assert bench.answer(name).token_ids == answer.token_ids
        assert bench.answer(name).logprobs == pytest.approx(answer.logprobs, abs=1e-4)


def test_log_probabilities_are_those_of_the_tokens_that_the_grammar_allows(bench: EngineBench) -> None:
    bench.start()
    guide = grammar(regex_guide("r", "[ab]c"))
    bench.add("greedy", PROMPT, guide=guide, num_logprobs=5)
    bench.add("plain", PROMPT, guide=guide)
    bench.run()
    first, second, _ = (output.top_logprobs[0] for output in bench.outputs["greedy"])
    assert sum(np.exp(top.logprob) for top in first) == pytest.approx(1, abs=1e-5) and len(first) == 2
    assert [top.logprob for top in second] == pytest.approx([0])
    assert bench.answer("plain").logprobs == pytest.approx(bench.answer("greedy").logprobs, abs=1e-5)


def test_the_end_token_comes_only_where_the_grammar_may_end_whatever_its_score(bench: EngineBench) -> None:
    bench.start()
    bench.add("a", PROMPT, guide=grammar(regex_guide("r", "x{7,}")), logit_bias={END: 100.0}, max_new_tokens=30)
    bench.run()
    assert text_of(bench, "a") == "x" * 7


@pytest.mark.parametrize(
    "given",
    [{"do_sample": True, "temperature": 5.0, "top_k": 3}, {"repetition_penalty": 3.0, "do_sample": True, "top_p": 0.5}],
)
def test_cuts_and_penalties_choose_among_what_the_grammar_allows(bench: EngineBench, given: dict) -> None:
    bench.start()
    bench.add("a", PROMPT, guide=grammar(regex_guide("r", PHONE)), max_new_tokens=30, **given)
    bench.run()
    assert re.fullmatch(PHONE, text_of(bench, "a"))


def test_an_output_that_is_too_long_is_cut_as_without_a_grammar(bench: EngineBench) -> None:
    bench.start()
    bench.add("a", PROMPT, guide=grammar(regex_guide("r", "[a-z]{50}")), max_new_tokens=10)
    bench.run()
    answer = bench.answer("a")
    assert answer.finish_reason == "length" and len(answer.token_ids) == 10


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        ("start: a\na: a", "no text can go on"),
        ("start: (", "grammar is not valid"),
        ('start: "a" b\nb: b "c"', "no text"),
    ],
)
def test_a_grammar_that_fails_ends_its_own_request_only(bench: EngineBench, bad: str, why: str) -> None:
    bench.start()
    bench.add("bad", PROMPT, guide=bad)
    bench.add("good", PROMPT, guide=grammar(choice_guide("c", ["yes"])))
    bench.add("free", PROMPT)
    bench.run()
    last = bench.outputs["bad"][-1]
    assert last.finish_reason == "error" and last.error is not None and why in last.error
    assert text_of(bench, "good") == "yes"
    assert bench.answer("free").token_ids
    assert bench.engine.blocks.num_used == 0


def test_a_request_that_leaves_while_its_grammar_compiles_or_runs_holds_nothing(bench: EngineBench) -> None:
    bench.start()
    bench.add("early", PROMPT, guide=grammar(regex_guide("r", "[a-m]{40}")))
    bench.engine.abort("early")
    assert not bench.engine.has_work
    bench.add("late", PROMPT, guide=grammar(regex_guide("r", "[a-m]{40}")), max_new_tokens=40)
    while len(bench.outputs["late"]) < 3:
        bench.step()
    bench.engine.abort("late")
    bench.add("next", PROMPT, guide=grammar(choice_guide("c", ["yes", "no"])))  # in the row that was left
    bench.run()
    assert text_of(bench, "next") in ("yes", "no")
    assert bench.engine.blocks.num_used == 0


def test_more_grammars_than_are_kept_are_each_compiled_once(
    bench: EngineBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[str] = []
    monkeypatch.setattr(guided, "MAX_IDLE", 2)
    bench.start()
    library = bench.engine._library
    compile_one = library._compile
    monkeypatch.setattr(library, "_compile", lambda grammar: (compiled.append(grammar), compile_one(grammar))[1])
    for number in range(9):
        bench.add(str(number), PROMPT, guide=grammar(choice_guide("c", [f"text {number}"])), max_new_tokens=20)
    bench.run()
    assert [text_of(bench, str(number)) for number in range(9)] == [f"text {number}" for number in range(9)]
    assert len(compiled) == len(set(compiled)) == 9
    assert len(library._entries) == 2  # none of them in use


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_mask_cuts_the_lines_it_is_for_to_the_tokens_whose_bit_is_set(dtype: torch.dtype) -> None:
    rng = np.random.default_rng(1)
    scores = torch.randn(4, 75).to(dtype)
    before = scores.clone()
    masks = rng.integers(-(2**31), 2**31, size=(2, 4), dtype=np.int64).astype(np.int32)  # more bits than tokens
    keep_allowed(scores, [1, 3], masks)
    for place, line in enumerate((1, 3)):
        mask = masks[place]
        for token in range(75):
            is_set = bool(int(mask[token // 32]) >> (token % 32) & 1)
            assert scores[line, token] == (before[line, token] if is_set else -torch.inf)
    assert torch.equal(scores[[0, 2]], before[[0, 2]])
