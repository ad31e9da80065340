"""Every spelling of structured output reaches the engine as the same grammar, and what cannot is refused by itself."""

import asyncio
import json
from typing import Any

import pytest
from scripted_engine import TestServer, with_server

from loraplex_server.text.guides import JSON_WHITESPACE, MAX_GUIDE_CHARACTERS, Guide

SCHEMA = {"type": "object", "properties": {"b": {"type": "integer"}, "a": {"type": "string"}}, "required": ["b"]}
WITH_SCHEMA = Guide("json_schema", json.dumps(SCHEMA, separators=(",", ":")))
ANY_OBJECT = Guide("json_schema", '{"type":"object"}')
CHAT = {"messages": [{"role": "user", "content": "hi"}]}
STRICT = {"name": "x", "schema": SCHEMA, "strict": True}


class Compiler:
    """Takes every guide and remembers it."""

    def __init__(self) -> None:
        self.guides: list[Guide] = []

    async def __call__(self, guide: Guide) -> str:
        self.guides.append(guide)
        return f"grammar {len(self.guides)}"


def ask(path: str, body: dict[str, Any], **options: Any) -> tuple[int, dict[str, Any], list[Guide], list[str | None]]:
    compiler = Compiler()
    seen: list[Any] = []

    async def test(server: TestServer) -> None:
        answer = await server.http.post(path, json=body)
        seen.append((answer.status_code, answer.json(), [one.sampling.guide for one in server.engine.requests]))

    with_server(test, **({"check_guide": compiler} | options))
    status, answer, grammars = seen[0]
    return status, answer, compiler.guides, grammars


@pytest.mark.parametrize(
    ("parameters", "guide"),
    [
        ({"grammar": {"type": "json", "value": SCHEMA}}, WITH_SCHEMA),
        ({"grammar": {"type": "json", "value": json.dumps(SCHEMA)}}, WITH_SCHEMA),
        ({"grammar": {"type": "json_object", "value": SCHEMA}}, WITH_SCHEMA),
        ({"grammar": {"type": "json_schema", "value": {"name": "x", "schema": SCHEMA}}}, WITH_SCHEMA),
        ({"grammar": {"type": "regex", "value": "a+"}}, Guide("regex", "a+")),
        ({"response_format": {"type": "json_object", "schema": SCHEMA}}, WITH_SCHEMA),
        ({"response_format": {"type": "JsonSchema", "schema": SCHEMA}}, WITH_SCHEMA),
        ({"response_format": {"type": "json_object"}}, ANY_OBJECT),
        ({"response_format": {"type": "json_object", "schema": None}}, None),
        ({"response_format": {"type": "text"}}, None),
        ({"grammar": None, "response_format": None}, None),
    ],
)
def test_the_forms_of_tgi_and_lorax_are_one_guide(parameters: dict[str, Any], guide: Guide | None) -> None:
    status, _, guides, grammars = ask("/generate", {"inputs": "hi", "parameters": parameters})
    assert status == 200
    assert guides == ([] if guide is None else [guide])
    assert grammars == [None if guide is None else "grammar 1"]


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
@pytest.mark.parametrize(
    ("fields", "guide"),
    [
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, ANY_OBJECT),
        ({"response_format": {"type": "json_schema", "json_schema": STRICT}}, WITH_SCHEMA),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, ANY_OBJECT),
        ({"response_format": {"type": "json_object", "value": SCHEMA}}, WITH_SCHEMA),
        ({"response_format": {"type": "regex", "value": "a+"}}, Guide("regex", "a+")),
        ({"guided_json": SCHEMA}, WITH_SCHEMA),
        ({"guided_json": json.dumps(SCHEMA), "guided_whitespace_pattern": " ?"},
         Guide("json_schema", WITH_SCHEMA.text, " ?")),
        ({"guided_regex": "a+"}, Guide("regex", "a+")),
        ({"guided_choice": ['"', "b"]}, Guide("lark", 'start: "\\"" | "b"')),
        ({"guided_grammar": 'root ::= "x"'}, Guide("grammar", 'root ::= "x"')),
        ({"structured_outputs": {"json": SCHEMA, "disable_any_whitespace": True, "regex": None}},
         Guide("json_schema", WITH_SCHEMA.text, None)),
        ({"structured_outputs": {"choice": ["a"]}}, Guide("lark", 'start: "a"')),
        ({"structured_outputs": {"json_object": True}}, ANY_OBJECT),
        ({"structured_outputs": None, "guided_json": None, "response_format": None}, None),
    ],
)  # fmt: skip
def test_the_forms_of_openai_and_vllm_are_one_guide(path: str, fields: dict[str, Any], guide: Guide | None) -> None:
    body = (CHAT if "chat" in path else {"prompt": "hi"}) | fields
    status, _, guides, grammars = ask(path, body)
    assert status == 200
    assert guides == ([] if guide is None else [guide])
    assert grammars == [None if guide is None else "grammar 1"]


def test_white_space_in_json_is_bounded_unless_a_pattern_says_otherwise() -> None:
    assert WITH_SCHEMA.whitespace == JSON_WHITESPACE and "{0,32}" in JSON_WHITESPACE


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"response_format": {"type": "xml"}}, "`response_format.type` must be one of text, json_object"),
        ({"response_format": {}}, "`response_format.type` must be one of"),
        ({"response_format": {"type": "json_schema"}}, "must have `json_schema`"),
        ({"response_format": {"type": "json_object", "schema": 5}}, "`response_format.schema` must be a JSON schema"),
        ({"response_format": {"type": "json", "value": "{"}}, "is a text, but no JSON schema"),
        ({"response_format": {"type": "regex"}}, "`response_format.value` must be a text"),
        ({"guided_regex": ""}, "`guided_regex` must be a text that is not empty"),
        ({"guided_choice": []}, "`guided_choice` must be a list"),
        ({"guided_choice": ["a", 5]}, "`guided_choice` must hold texts"),
        ({"guided_json": SCHEMA, "guided_regex": "a"}, "only one of"),
        ({"guided_json": SCHEMA, "response_format": {"type": "json_object"}}, "only one of"),
        ({"structured_outputs": {}}, "must have exactly one of json, regex, choice, grammar, json_object. Given: 0"),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "Given: 2"),
        ({"structured_outputs": {"structural_tag": "x"}}, "`structured_outputs.structural_tag` is not supported"),
        ({"structured_outputs": {"json": SCHEMA, "whitespace_pattern": 5}}, "must be a regular expression"),
        (
            {"guided_regex": "a" * (MAX_GUIDE_CHARACTERS + 1)},
            "at most 65536 characters. Given: 65537",
        ),
        ({"guided_regex": "a", "ignore_eos": True}, "`ignore_eos` cannot be used with a grammar"),
        ({"guided_regex": "a", "min_tokens": 2}, "`min_tokens` cannot be used with a grammar"),
        ({"guided_regex": "a", "allowed_token_ids": [5]}, "`allowed_token_ids` cannot be used with a grammar"),
    ],
)
def test_what_is_no_form_is_refused_before_it_is_compiled(fields: dict[str, Any], words: str) -> None:
    status, answer, guides, grammars = ask("/v1/chat/completions", CHAT | fields)
    assert status == 422 and answer["error"]["type"] == "validation"
    assert words in answer["error"]["message"]
    assert guides == [] and grammars == []


@pytest.mark.parametrize("path", ["/generate", "/v1/completions"])
def test_a_server_without_grammars_refuses_them(path: str) -> None:
    grammar = {"type": "regex", "value": "a+"}
    body = {"inputs": "hi", "parameters": {"grammar": grammar}, "prompt": "hi", "response_format": grammar}
    status, answer, _, grammars = ask(path, body, check_guide=None)
    assert status == 422 and "grammar is not supported" in str(answer)
    assert grammars == []


def test_several_answers_share_one_compilation_and_have_the_grammar_each() -> None:
    body = CHAT | {"guided_choice": ["a", "b"], "n": 3}
    status, _, guides, grammars = ask("/v1/chat/completions", body)
    assert status == 200 and len(set(guides)) == 1 and len(grammars) == 3 and None not in grammars


def test_a_compilation_that_takes_long_holds_up_nobody_else() -> None:
    async def test(server: TestServer) -> None:
        slow = asyncio.create_task(server.generate(grammar={"type": "regex", "value": "a"}))
        await begun.wait()
        assert (await server.generate()).status_code == 200
        assert not slow.done()
        going_on.set()
        assert (await slow).status_code == 200

    begun, going_on = asyncio.Event(), asyncio.Event()

    async def compile_slowly(guide: Guide) -> str:
        begun.set()
        await going_on.wait()
        return "grammar"

    with_server(test, check_guide=compile_slowly)
