"""Structured output from the demo model as `make serve` starts it, asked for by the released clients."""

import concurrent.futures
import json
import re
from collections.abc import Iterator
from typing import Any

import httpx
import jsonschema
import openai
import psutil
import pytest
from demo_server import LaunchedServer
from huggingface_hub import InferenceClient

ASK = [{"role": "user", "content": "Describe the pirate Anne Bonny."}]
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "ships": {"type": "array", "items": {"enum": ["sloop", "galleon", "brig"]}, "minItems": 1, "maxItems": 3},
        "age": {"type": "integer", "minimum": 18, "maximum": 80},
        "feared": {"type": "boolean"},
    },
    "required": ["name", "ships", "age", "feared"],
}
PHONE = r"\([0-9]{3}\) [0-9]{4}"

pytestmark = pytest.mark.slow


@pytest.fixture
def client(demo_server: LaunchedServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{demo_server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def validated(text: str) -> Any:
    found = json.loads(text)
    jsonschema.validate(found, SCHEMA)
    return found


@pytest.mark.parametrize(("model", "temperature"), [("tgi", 0), ("pirate", 1.3), ("shout", 0)])
def test_openai_gets_what_its_schema_asks_for(client: openai.OpenAI, model: str, temperature: float) -> None:
    answer = client.chat.completions.create(
        model=model,
        messages=ASK,
        max_tokens=250,
        temperature=temperature,
        seed=4,
        response_format={"type": "json_schema", "json_schema": {"name": "pirate", "schema": SCHEMA, "strict": True}},
    )
    assert answer.choices[0].finish_reason == "stop"
    validated(answer.choices[0].message.content or "")


def test_openai_streams_the_same_and_draws_several(client: openai.OpenAI) -> None:
    asked: Any = {
        "model": "tgi",
        "messages": ASK,
        "max_tokens": 250,
        "n": 3,
        "seed": 8,
        "response_format": {"type": "json_schema", "json_schema": {"name": "pirate", "schema": SCHEMA}},
    }
    whole = [choice.message.content for choice in client.chat.completions.create(**asked).choices]
    streamed = ["", "", ""]
    for chunk in client.chat.completions.create(**asked, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert [validated(text or "") for text in whole] and [validated(text) for text in streamed]
    assert len(set(whole)) > 1


def test_huggingface_gets_grammars_by_both_routes(demo_server: LaunchedServer) -> None:
    client = InferenceClient(demo_server.url)
    asked: Any = {"max_new_tokens": 250, "return_full_text": False}
    assert re.fullmatch(PHONE, client.text_generation("Call:", grammar={"type": "regex", "value": PHONE}, **asked))
    validated(client.text_generation("A pirate:", grammar={"type": "json", "value": SCHEMA}, **asked))
    pieces = client.text_generation("Call:", grammar={"type": "regex", "value": PHONE}, stream=True, **asked)
    assert re.fullmatch(PHONE, "".join(pieces).removesuffix("<|im_end|>"))  # TGI shows the end token in streams
    for response_format in (
        {"type": "json_schema", "json_schema": {"name": "pirate", "schema": SCHEMA}},
        {"type": "json_object", "value": SCHEMA},
        {"type": "json", "value": SCHEMA},
    ):
        answer = client.chat_completion(ASK, response_format=response_format, max_tokens=250, temperature=0.0)
        validated(answer.choices[0].message.content)


@pytest.mark.parametrize(
    ("fields", "pattern"),
    [
        ({"guided_choice": ["yes", "no"]}, "yes|no"),
        ({"guided_regex": PHONE}, PHONE),
        ({"guided_grammar": 'root ::= ("ahoy " name)+\nname ::= "Anne" | "Mary"'}, "(ahoy (Anne|Mary))+"),
        ({"structured_outputs": {"grammar": 'start: "ahoy " NAME\nNAME: /[A-Z][a-z]{2,5}/'}}, "ahoy [A-Z][a-z]{2,5}"),
    ],
)
def test_vllms_fields_are_obeyed(client: openai.OpenAI, fields: dict[str, Any], pattern: str) -> None:
    completion = client.completions.create(
        model="pirate", prompt="Ahoy!", max_tokens=60, temperature=0.7, seed=1, extra_body=fields
    )
    choice = completion.choices[0]
    if choice.finish_reason == "stop":
        assert re.fullmatch(pattern, choice.text)
    else:
        assert choice.finish_reason == "length" and pattern.startswith("(ahoy")


def test_bad_grammars_are_refused_while_good_ones_are_answered(demo_server: LaunchedServer) -> None:
    def ask(pattern: str) -> httpx.Response:
        body = {"inputs": "Call me:", "parameters": {"grammar": {"type": "regex", "value": pattern}}}
        return httpx.post(f"{demo_server.url}/generate", json=body, timeout=300)

    before = set(demo_server.pids.values())
    bad = ["(", "(?<=x)a", r"[^\s\S]", "[z-a]", "(" * 20_000 + ")" * 20_000]
    with concurrent.futures.ThreadPoolExecutor(10) as pool:
        answers = list(pool.map(ask, [PHONE, *bad, PHONE, *bad]))
    for place, answer in enumerate(answers):
        if place in (0, 6):
            assert re.fullmatch(PHONE, answer.json()["generated_text"])
        else:
            assert answer.status_code == 422 and answer.json()["error_type"] == "validation"
            assert "grammar is not valid" in answer.json()["error"]
    assert all(psutil.pid_exists(pid) for pid in before)
    assert demo_server.gauges()["loraplex_kv_blocks_used"] == 0
