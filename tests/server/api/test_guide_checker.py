"""The process that compiles grammars: good ones, bad ones, and what becomes of it when one breaks it."""

import asyncio
import json
import os
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from scripted_engine import DEADLINE_S
from tiny_tokenizer import byte_tokenizer

from loraplex_server.api import guide_checker
from loraplex_server.api.guide_checker import GuideChecker
from loraplex_server.errors import InvalidRequest
from loraplex_server.text.guide_check import TIME_IS_UP, Setup
from loraplex_server.text.guide_compiler import Vocabulary, fill_mask
from loraplex_server.text.guides import Guide, choice_guide, schema_guide

END = 2
GOOD = Guide("regex", "[0-9]+")


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> Setup:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    byte_tokenizer().save(str(path))
    return Setup(str(path), byte_tokenizer().get_vocab_size(), [END])


def with_checker(setup: Setup, test: Callable[[GuideChecker], Awaitable[None]]) -> None:
    async def run() -> None:
        checker = GuideChecker(setup)
        try:
            async with asyncio.timeout(DEADLINE_S):
                await test(checker)
        finally:
            await checker.close()

    asyncio.run(run())


def accepts(setup: Setup, grammar: str, text: str) -> bool:
    import numpy as np

    vocabulary = Vocabulary(setup.tokenizer_path, setup.vocab_size, setup.end_token_ids)
    matcher = vocabulary.matcher(grammar)
    token_ids = byte_tokenizer().encode(text).ids
    if matcher.try_consume_tokens(token_ids) < len(token_ids):
        return False
    mask = np.zeros((1, vocabulary.num_words), dtype=np.int32)
    return fill_mask(matcher, mask, 0) is None and bool(mask[0, 0] >> END & 1)


def nested(depth: int) -> str:
    return '{"items":' * depth + "{}" + "}" * depth


@pytest.mark.parametrize(
    ("guide", "good", "bad"),
    [
        (GOOD, ["7", "12"], ["", "a", "1a"]),
        (Guide("regex", "^(foo|bar)$"), ["foo", "bar"], ["fo", "foobar", "^foo$"]),
        (choice_guide("c", ['say "a"', "b\n"]), ['say "a"', "b\n"], ["say", "b"]),
        (Guide("grammar", 'root ::= "a" b*\nb ::= "b" | "c"'), ["a", "abc"], ["b", "ad"]),
        (Guide("grammar", 'start: "a" B*\nB: /[bc]/'), ["a", "abc"], ["b", "ad"]),
        (schema_guide("s", {"enum": [1, "x", None]}), ["1", '"x"', "null"], ["2"]),
        (schema_guide("s", {"properties": {"a": {"type": "integer"}}, "type": "object"}),
         ["{}", '{"a":1}', '{\n    "a": 1\n}'],
         ['{"b": 1}', '{"a": "1"}', '{"a":  1}', '{"a":\n\n1}', ' {"a": 1}', '{"a": 1}\n']),
        (schema_guide("s", {"properties": {"a": {"type": "integer"}}, "type": "object",
                            "additionalProperties": True}), ['{"a": 1, "b": 1}'], ["[]"]),
        (schema_guide("s", True), ["1", "[]", '{"a": [true]}'], ["x"]),
        (schema_guide("s", {"type": "array", "items": {"type": "null"}}, None),
         ["[null, null]"], ["[null,null]", "[ ]"]),
    ],
)  # fmt: skip
def test_a_guide_becomes_a_grammar_of_just_the_texts_it_means(
    setup: Setup, guide: Guide, good: list[str], bad: list[str]
) -> None:
    async def test(checker: GuideChecker) -> None:
        grammars.append(await checker.check(guide))

    grammars: list[str] = []
    with_checker(setup, test)
    assert [text for text in good if not accepts(setup, grammars[0], text)] == []
    assert [text for text in bad if accepts(setup, grammars[0], text)] == []


BAD = [
    Guide("regex", "("),
    Guide("regex", "(?<=x)a"),
    Guide("regex", "(" * 30_000 + ")" * 30_000),
    Guide("regex", r"[^\s\S]"),
    Guide("grammar", "start: " + "(" * 30_000 + '"a"' + ")" * 30_000),
    Guide("grammar", "start: a\na: a"),
    Guide("grammar", "no grammar at all"),
    Guide("grammar", 'foo: "a"'),
    Guide("json_schema", '{"type":"strin"}'),
    Guide("json_schema", '{"type":5}'),
    Guide("json_schema", '{"properties":[]}'),
    Guide("json_schema", '{"$ref":"#"}'),
    Guide("json_schema", '{"$ref":"http://127.0.0.1:1/schema"}'),
    Guide("json_schema", '{"$ref":"file:///etc/passwd"}'),
    Guide("json_schema", "false"),
    Guide("json_schema", '{"not":{"type":"string"}}'),
    Guide("json_schema", '{"type":"array","uniqueItems":true}'),
    Guide("json_schema", '{"type":"object","required":["a"],"properties":{"a":false}}'),
    Guide("json_schema", nested(10_000)),
    Guide("json_schema", json.dumps({"enum": [f"value {i}" for i in range(100_000)]})),
]


def test_bad_guides_are_refused_and_the_same_process_goes_on(setup: Setup) -> None:
    async def test(checker: GuideChecker) -> None:
        await checker.check(GOOD)
        child = checker._child
        for guide in BAD:
            with pytest.raises(InvalidRequest, match="grammar is not valid: ") as refusal:
                await checker.check(guide)
            assert len(str(refusal.value)) < 400
            assert str(Path.home()) not in str(refusal.value)
        assert checker._child is child and child is not None and child.returncode is None
        await checker.check(Guide("regex", "(a|aa)+"))
        await checker.check(Guide("regex", "((a{1,1000}){1,1000})"))

    with_checker(setup, test)


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (signal.SIGKILL, "breaks"),
        (signal.SIGSEGV, "breaks"),
        (TIME_IS_UP, "longer than 2 s"),
        (signal.SIGSTOP, r"within 0\.1 s"),
    ],
)
def test_a_broken_slow_or_stuck_compiler_costs_one_request(
    setup: Setup, fault: signal.Signals, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test(checker: GuideChecker) -> None:
        await checker.check(GOOD)
        assert checker._child is not None
        os.kill(checker._child.pid, fault)
        with monkeypatch.context() as patch, pytest.raises(InvalidRequest, match=reason):
            if fault is signal.SIGSTOP:
                patch.setattr(guide_checker, "STUCK_TIMEOUT_S", 0.1)
            await checker.check(Guide("regex", "b+"))
        assert await checker.check(Guide("regex", "c+"))

    with_checker(setup, test)


def test_verdicts_are_remembered_good_and_bad(setup: Setup) -> None:
    async def test(checker: GuideChecker) -> None:
        grammar = await checker.check(GOOD)
        with pytest.raises(InvalidRequest):
            await checker.check(BAD[0])
        assert checker._child is not None
        os.kill(checker._child.pid, signal.SIGKILL)
        assert await checker.check(GOOD) == grammar
        with pytest.raises(InvalidRequest, match="unclosed group"):
            await checker.check(BAD[0])

    with_checker(setup, test)


def test_a_client_that_leaves_does_not_leave_its_verdict_to_the_next(setup: Setup) -> None:
    async def test(checker: GuideChecker) -> None:
        await checker.check(GOOD)
        assert checker._child is not None
        os.kill(checker._child.pid, signal.SIGSTOP)
        leaving = asyncio.create_task(checker.check(Guide("regex", "left+")))
        while not checker._turn.locked():
            await asyncio.sleep(0)
        await asyncio.sleep(0.05)
        leaving.cancel()
        await asyncio.gather(leaving, return_exceptions=True)
        assert "next+" in await checker.check(Guide("regex", "next+"))

    with_checker(setup, test)


@pytest.mark.parametrize("wrong", [{"tokenizer_path": "/nowhere/tokenizer.json"}, {"end_token_ids": []}])
def test_a_model_that_cannot_have_grammars_says_so(setup: Setup, wrong: dict) -> None:
    async def test(checker: GuideChecker) -> None:
        with pytest.raises(InvalidRequest, match="grammar is not supported: this model"):
            await checker.check(GOOD)

    given = {"tokenizer_path": setup.tokenizer_path, "vocab_size": setup.vocab_size, "end_token_ids": [END]} | wrong
    with_checker(Setup(**given), test)
