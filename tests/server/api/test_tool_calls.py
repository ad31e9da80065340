"""Tools in chat: what reaches the template and the engine, and how calls come back, whole and streamed."""

import json
from typing import Any

import openai
import pytest
from scripted_engine import ScriptedEngine, TestServer, with_server
from tool_conversations import CALL, HERMES, SHOWS_TOOLS, TOOLS, WEATHER, WIDE, Compiler

USER = [{"role": "user", "content": "hi"}]
SHOWS_NONE = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }};{% endfor %}"


def ask(
    fields: dict[str, Any], says: str = "hello", *, messages: Any = USER, template: str = SHOWS_TOOLS, **options: Any
) -> tuple[int, dict[str, Any], str, list[str | None]]:
    """Status, answer, prompt and the grammars that the engine got."""
    seen: list[Any] = []

    async def test(server: TestServer) -> None:
        answer = await server.http.post("/v1/chat/completions", json={"messages": messages, "max_tokens": 500} | fields)
        requests = server.engine.requests
        prompt = bytes(requests[0].prompt_token_ids).decode() if requests else ""
        seen.append((answer.status_code, answer.json(), prompt, [one.sampling.guide for one in requests]))

    given = {"check_guide": Compiler(), "engine": ScriptedEngine({None: says}), "limits": WIDE} | options
    with_server(test, chat_template=template, **given)
    return seen[0]


def calls_of(answer: dict[str, Any]) -> list[tuple[str, Any]]:
    message = answer["choices"][0]["message"]
    assert all(call["type"] == "function" and call["id"].startswith("call_") for call in message.get("tool_calls", []))
    return [
        (call["function"]["name"], json.loads(call["function"]["arguments"])) for call in message.get("tool_calls", [])
    ]


def test_the_template_shows_the_tools_and_the_answers_calls_come_apart() -> None:
    status, answer, prompt, grammars = ask({"tools": TOOLS}, f"Let me see.\n{HERMES(CALL)}")
    assert status == 200 and grammars == [None]
    assert prompt.startswith('T:{"name": "weather", "parameters": {"type": "object"')
    assert 'T:{"name": "add", "parameters": {"type": "object", "properties": {}}};u:hi;' in prompt
    assert calls_of(answer) == [("weather", {"city": "Paris"})]
    choice = answer["choices"][0]
    assert choice["finish_reason"] == "tool_calls" and choice["message"]["content"] == "Let me see.\n"
    assert set(choice["message"]["tool_calls"][0]) == {"id", "type", "function"}


def test_an_answer_without_a_call_is_text_as_ever() -> None:
    _, answer, _, _ = ask({"tools": TOOLS, "tool_choice": "auto"}, "no <tool here")
    assert answer["choices"][0]["message"] == {"role": "assistant", "content": "no <tool here"}
    assert answer["choices"][0]["finish_reason"] == "stop"


def test_an_answer_of_calls_alone_has_no_content() -> None:
    _, answer, _, _ = ask({"tools": TOOLS}, HERMES(CALL) + "\n" + HERMES('{"name": "add", "arguments": {}}'))
    assert answer["choices"][0]["message"]["content"] is None
    assert calls_of(answer) == [("weather", {"city": "Paris"}), ("add", {})]
    ids = [call["id"] for call in answer["choices"][0]["message"]["tool_calls"]]
    assert len(set(ids)) == 2


def test_without_parallel_calls_there_is_one() -> None:
    _, answer, _, _ = ask({"tools": TOOLS, "parallel_tool_calls": False}, HERMES(CALL) * 2)
    assert calls_of(answer) == [("weather", {"city": "Paris"})]


def test_none_leaves_the_tools_out_and_calls_are_text() -> None:
    _, answer, prompt, _ = ask({"tools": TOOLS, "tool_choice": "none"}, HERMES(CALL))
    assert prompt == "u:hi;"
    assert answer["choices"][0]["message"] == {"role": "assistant", "content": HERMES(CALL)}


@pytest.mark.parametrize(
    "choice",
    [
        {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [WEATHER]}},
        {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "weather"}]},
    ],
)
def test_tools_that_are_not_allowed_are_not_shown(choice: Any) -> None:
    _, answer, prompt, grammars = ask({"tools": TOOLS, "tool_choice": choice}, HERMES(CALL))
    assert prompt.startswith('T:{"name": "weather"') and '"add"' not in prompt
    assert calls_of(answer) == [("weather", {"city": "Paris"})]
    assert answer["choices"][0]["finish_reason"] == "tool_calls"
    assert (grammars[0] is not None) == ("mode" in choice)


@pytest.mark.parametrize(
    ("choice", "names", "reason"),
    [
        ("required", ("weather", "add"), "tool_calls"),
        ({"type": "function", "function": {"name": "weather"}}, ("weather",), "stop"),
        ({"function": {"name": "weather"}}, ("weather",), "stop"),
        ("weather", ("weather",), "stop"),
    ],
)
def test_a_call_that_must_come_has_a_grammar_of_the_tools_it_may_call(
    choice: Any, names: tuple[str, ...], reason: str
) -> None:
    status, answer, _, grammars = ask({"tools": TOOLS, "tool_choice": choice}, HERMES(CALL))
    assert status == 200 and grammars[0] is not None
    for name in ("weather", "add"):
        assert (f'\\"name\\": \\"{name}\\"' in grammars[0]) == (name in names)
    assert '"<tool_call>"' in grammars[0]
    assert calls_of(answer) == [("weather", {"city": "Paris"})]
    assert answer["choices"][0]["finish_reason"] == reason


def test_an_answer_of_a_schema_may_be_a_call_instead() -> None:
    fields = {"tools": TOOLS, "response_format": {"type": "json_object"}}
    _, answer, _, grammars = ask(fields, HERMES(CALL))
    assert grammars[0] is not None and "start: calls | answer" in grammars[0]
    assert calls_of(answer) == [("weather", {"city": "Paris"})]
    _, answer, _, _ = ask(fields, '{"a": 1}')
    assert answer["choices"][0]["message"]["content"] == '{"a": 1}'
    # Where a call must come, the schema of an answer has no place.
    _, _, _, grammars = ask(fields | {"tool_choice": "required"}, HERMES(CALL))
    assert grammars[0] is not None and "answer" not in grammars[0]
    _, _, _, grammars = ask(fields | {"tool_choice": "none"}, '{"a": 1}')
    assert grammars == ['G:{"type":"object"}']


def test_earlier_calls_and_their_results_reach_the_template() -> None:
    function = {"name": "weather", "arguments": '{"city": "Paris"}'}
    messages = [
        *USER,
        {"role": "assistant", "content": None, "tool_calls": [{"id": "c1", "type": "function", "function": function}]},
        {"role": "tool", "tool_call_id": "c1", "content": "sunny"},
    ]
    status, _, prompt, _ = ask({}, messages=messages)
    assert status == 200
    assert prompt == 'u:hi;a:<tool_call>weather={"city": "Paris"};t:sunny;'
    _, _, prompt, _ = ask({}, messages=messages, template=SHOWS_NONE)
    assert prompt.startswith('u:hi;a:[{"id": "c1"') and prompt.endswith(";t:sunny;")


def test_a_template_without_tools_has_them_written_out_with_what_to_do() -> None:
    _, answer, prompt, _ = ask({"tools": TOOLS}, CALL, template=SHOWS_NONE)
    assert prompt.startswith('u:hi\n---\n[{"type": "function", "function": {"name": "weather"')
    assert prompt.endswith("Do not use variables.;")
    assert calls_of(answer) == [("weather", {"city": "Paris"})]
    _, _, prompt, _ = ask({"tools": TOOLS, "tool_prompt": "Call!"}, CALL, template=SHOWS_NONE)
    assert prompt.endswith("]\nCall!;")
    _, _, prompt, _ = ask({"tools": TOOLS, "tool_prompt": "Call!"})
    assert prompt.endswith("u:hi\n---\nCall!;")


def test_the_parser_that_the_operator_names_reads_the_answers() -> None:
    says = '[TOOL_CALLS] [{"name": "add", "arguments": {}}]'
    seen: list[Any] = []

    async def test(server: TestServer) -> None:
        answer = await server.http.post("/v1/chat/completions", json={"messages": USER, "tools": TOOLS})
        seen.append(answer.json()["choices"][0]["message"])

    with_server(test, engine=ScriptedEngine({None: says}), limits=WIDE, tool_call_parser="mistral")
    assert seen[0]["content"] is None and seen[0]["tool_calls"][0]["function"] == {"name": "add", "arguments": "{}"}
    # Mistral's templates take no other ids.
    assert len(seen[0]["tool_calls"][0]["id"]) == 9 and seen[0]["tool_calls"][0]["id"].isalnum()


@pytest.mark.parametrize("choice", ["auto", "required", "weather"])
@pytest.mark.parametrize("logprobs", [False, True])
def test_openai_reads_the_same_calls_from_a_stream(choice: str, logprobs: bool) -> None:
    says = "Look:" * (choice == "auto") + HERMES(CALL) + HERMES('{"name": "add", "arguments": {"a": [1, 2]}}')
    tool_choice: Any = choice if choice != "weather" else {"type": "function", "function": {"name": choice}}
    is_named = choice == "weather"

    async def test(server: TestServer) -> None:
        async with openai.AsyncOpenAI(base_url=f"{server.base_url}/v1", api_key="x", max_retries=0) as client:
            stream = await client.chat.completions.create(
                model="tgi", messages=USER, tools=TOOLS, tool_choice=tool_choice, stream=True, max_tokens=500,
                logprobs=logprobs,
            )  # fmt: skip
            text, calls, reasons, spelt = "", [], [], ""
            async for chunk in stream:
                delta = chunk.choices[0].delta
                text += delta.content or ""
                reasons.append(chunk.choices[0].finish_reason)
                for call in delta.tool_calls or []:
                    if call.id is not None:
                        assert call.type == "function" and call.index == len(calls) and call.function.arguments == ""
                        calls.append([call.function.name, ""])
                    else:
                        assert call.function.name is None and call.type is None and call.index == len(calls) - 1
                        calls[-1][1] += call.function.arguments
                if logprobs and chunk.choices[0].logprobs is not None:
                    spelt += "".join(one.token for one in chunk.choices[0].logprobs.content)
        assert text == ("Look:" if choice == "auto" else "")
        assert [(name, json.loads(arguments)) for name, arguments in calls] == [
            ("weather", {"city": "Paris"}), *([("add", {"a": [1, 2]})] if not is_named else [])
        ]  # fmt: skip
        assert reasons[-1] == ("stop" if is_named else "tool_calls") and set(reasons[:-1]) == {None}
        assert spelt.removesuffix("</s>") == (says if logprobs else "")

    with_server(
        test, engine=ScriptedEngine({None: says}), limits=WIDE, live=True, chat_template=SHOWS_TOOLS,
        check_guide=Compiler(),
    )  # fmt: skip


def test_arguments_are_streamed_while_they_are_written() -> None:
    seen: list[Any] = []

    async def test(server: TestServer) -> None:
        body = {"messages": USER, "tools": TOOLS, "stream": True, "max_tokens": 500}
        answer = await server.http.post("/v1/chat/completions", json=body)
        seen.extend(json.loads(line[6:]) for line in answer.text.split("\n\n") if line.startswith("data: {"))

    with_server(test, engine=ScriptedEngine({None: HERMES(CALL)}), limits=WIDE, chat_template=SHOWS_TOOLS)
    gained = [chunk["choices"][0]["delta"].get("tool_calls") for chunk in seen]
    pieces = [one[0]["function"]["arguments"] for one in gained if one]
    assert len(pieces) > 10 and "".join(pieces) == '{"city": "Paris"}'


def test_a_call_that_is_cut_says_so() -> None:
    _, answer, _, _ = ask({"tools": TOOLS, "max_tokens": 45}, HERMES(CALL))
    choice = answer["choices"][0]
    assert choice["finish_reason"] == "length"
    assert choice["message"]["tool_calls"][0]["function"]["name"] == "weather"


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"tools": [{}]}, "`tools[0]` must be an object of type function"),
        ({"tools": [WEATHER, 5]}, "`tools[1]` must be"),
        ({"tools": [{"type": "retrieval", "function": {"name": "x"}}]}, "`tools[0]` must be an object of type"),
        ({"tools": [{"type": "function", "function": {"name": ""}}]}, "`tools[0].function.name` must be"),
        (
            {"tools": [{"type": "function", "function": {"name": "x", "parameters": []}}]},
            "of 'x' must be a JSON schema",
        ),
        ({"tools": [{"type": "function", "function": {"name": "x", "parameters": {"type": "array"}}}]}, "of 'x'"),
        ({"tools": [{"type": "function", "function": {"name": "x", "description": 5}}]}, "description` of 'x'"),
        ({"tools": [WEATHER, WEATHER]}, "more than one tool with the name 'weather'"),
        ({"tools": [WEATHER] * 129}, "`tools` must have at most 128 entries. Given: 129"),
        ({"tools": TOOLS, "tool_choice": "nobody"}, "Tool with name nobody not found"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "x"}}}, "name x not found"),
        (
            {"tools": TOOLS, "tool_choice": {"type": "allowed_tools"}},
            "must have `mode`, auto or required, and functions",
        ),
        (
            {"tools": TOOLS, "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [{"name": "x"}]}},
            "name x not found",
        ),
        ({"tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [WEATHER]}}, "there are no `tools`"),
        ({"tools": TOOLS, "tool_choice": 5}, "`tool_choice` must be"),
        ({"tool_choice": "required"}, "there are no `tools`"),
        ({"tools": [], "tool_choice": "weather"}, "there are no `tools`"),
        ({"tools": TOOLS, "guided_regex": "a+"}, "Grammar and tools are mutually exclusive"),
        ({"messages": [*USER, {"role": "tool", "content": "5", "tool_call_id": "x"}]}, "'x', which was not made"),
    ],
)
def test_what_is_wrong_with_tools_is_a_tool_error(fields: dict[str, Any], words: str) -> None:
    status, answer, _, grammars = ask(fields)
    assert status == 422 and answer["error"]["type"] == "tool_error"
    assert answer["error"]["message"].startswith("Tool error: ") and words in answer["error"]["message"]
    assert grammars == []


def test_a_tool_whose_parameters_do_not_compile_is_named() -> None:
    bad = {"type": "function", "function": {"name": "odd", "parameters": {"type": "object", "pattern": "bad one"}}}
    status, answer, _, _ = ask({"tools": [*TOOLS, bad], "tool_choice": "required"}, check_guide=Compiler("bad one"))
    assert status == 422 and answer["error"]["type"] == "tool_error"
    assert "the parameters of the tool 'odd': grammar is not valid" in answer["error"]["message"]
    # Where nothing is enforced, parameters are only shown to the model.
    assert ask({"tools": [*TOOLS, bad]}, check_guide=Compiler("bad one"))[0] == 200


def test_a_server_without_grammars_refuses_calls_that_must_come() -> None:
    status, answer, _, _ = ask({"tools": TOOLS, "tool_choice": "required"}, check_guide=None)
    assert status == 422 and "grammar is not supported" in answer["error"]["message"]
