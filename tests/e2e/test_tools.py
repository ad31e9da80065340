"""Calls of tools by the demo model, which was never taught any: `required` and named ones come all the same."""

import json
from collections.abc import Iterator
from typing import Any

import jsonschema
import openai
import pytest
from demo_server import LaunchedServer
from huggingface_hub import InferenceClient

ASK: Any = [{"role": "user", "content": "What is the weather in Paris, and how much is 3 plus 4?"}]
SCHEMAS: dict[str, Any] = {
    "get_weather": {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 20}, "unit": {"enum": ["C", "F"]}},
        "required": ["city", "unit"],
    },
    "add": {
        "type": "object",
        "properties": {"a": {"type": "integer", "maximum": 999}, "b": {"type": "integer", "maximum": 999}},
        "required": ["a", "b"],
    },
    "now": {"type": "object", "properties": {}},
}
TOOLS: Any = [
    {"type": "function", "function": {"name": name, "description": f"Does {name}", "parameters": schema}}
    for name, schema in SCHEMAS.items()
]
CHOICES: list[Any] = ["required", *({"type": "function", "function": {"name": name}} for name in SCHEMAS)]

pytestmark = pytest.mark.slow


@pytest.fixture
def client(demo_server: LaunchedServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{demo_server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def check_calls(choice: Any, calls: list[tuple[str, str]], reason: str | None) -> None:
    assert calls
    for name, arguments in calls:
        assert name in SCHEMAS if choice == "required" else name == choice["function"]["name"]
        jsonschema.validate(json.loads(arguments), SCHEMAS[name] | {"additionalProperties": False})
    assert reason == ("tool_calls" if choice == "required" else "stop")


@pytest.mark.parametrize("choice", CHOICES, ids=["required", *SCHEMAS])
@pytest.mark.parametrize(("model", "temperature"), [("tgi", 0), ("pirate", 1.5)])
def test_a_call_that_must_come_comes_with_arguments_of_its_schema(
    client: openai.OpenAI, choice: Any, model: str, temperature: float
) -> None:
    asked: Any = {
        "model": model, "messages": ASK, "tools": TOOLS, "tool_choice": choice, "temperature": temperature, "seed": 7,
        "max_tokens": 120, "parallel_tool_calls": False,
    }  # fmt: skip
    answer = client.chat.completions.create(**asked).choices[0]
    assert answer.message.content is None
    whole = [(call.function.name, call.function.arguments) for call in answer.message.tool_calls or []]
    check_calls(choice, whole, answer.finish_reason)

    streamed: list[list[str]] = []
    reason = None
    for chunk in client.chat.completions.create(**asked, stream=True):
        reason = chunk.choices[0].finish_reason or reason
        assert not chunk.choices[0].delta.content
        for call in chunk.choices[0].delta.tool_calls or []:
            if call.function.name:
                streamed.append([call.function.name, ""])
            streamed[-1][1] += call.function.arguments or ""
    check_calls(choice, [(name, arguments) for name, arguments in streamed], reason)


def test_several_calls_may_come_at_once(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="tgi", messages=ASK, tools=TOOLS, tool_choice="required", max_tokens=500, temperature=1.0, seed=5, n=4
    )
    counts = []
    for choice in answer.choices:
        calls = [(call.function.name, call.function.arguments) for call in choice.message.tool_calls or []]
        counts.append(len(calls))
        if choice.finish_reason == "tool_calls":
            check_calls("required", calls, choice.finish_reason)
        else:
            assert choice.finish_reason == "length"
    assert max(counts) > 1


def test_the_result_of_a_call_can_be_sent_back(client: openai.OpenAI) -> None:
    first = client.chat.completions.create(
        model="tgi", messages=ASK, tools=TOOLS, tool_choice="required", parallel_tool_calls=False, max_tokens=120
    )
    message = first.choices[0].message
    assert message.tool_calls
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "sunny, 21 degrees"}
    second = client.chat.completions.create(
        model="tgi", messages=[*ASK, message, result], tools=TOOLS, tool_choice="none", max_tokens=16, temperature=0
    )
    assert second.choices[0].message.content


def test_huggingface_reads_calls_whole_and_streamed(demo_server: LaunchedServer) -> None:
    client = InferenceClient(demo_server.url)
    asked: Any = {"tools": TOOLS, "tool_choice": "get_weather", "max_tokens": 120, "seed": 3, "temperature": 0.5}
    answer = client.chat_completion(ASK, **asked).choices[0]
    call = answer.message.tool_calls[0]
    check_calls(CHOICES[1], [(call.function.name, call.function.arguments)], answer.finish_reason)
    name, arguments = "", ""
    for chunk in client.chat_completion(ASK, **asked, stream=True):
        for delta in chunk.choices[0].delta.tool_calls or []:
            name += delta.function.name or ""
            arguments += delta.function.arguments or ""
    check_calls(CHOICES[1], [(name, arguments)], "stop")
    free = client.chat_completion(ASK, tools=TOOLS, tool_choice="auto", max_tokens=16).choices[0].message
    assert free.content or free.tool_calls
