"""Function tools of /v1/responses: what reaches the template, and calls as items and events of openai's own types."""

import json
from typing import Any

import openai
import pytest
from openai.types.responses import Response
from response_events import checked_events_of
from scripted_engine import ScriptedEngine, TestServer, with_server
from tool_conversations import CALL, CITY, HERMES, SHOWS_TOOLS, WIDE, Compiler

WEATHER: Any = {"type": "function", "name": "weather", "description": "Tells the weather", "parameters": CITY}
ADD: Any = {"type": "function", "name": "add", "parameters": None, "strict": False}
TOOLS = [WEATHER, ADD]
ADDS = '{"name": "add", "arguments": {"a": [1, 2]}}'
ITEMS: list[Any] = [
    {"role": "user", "content": "hi"},
    {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
    {"type": "message", "id": "m", "role": "assistant", "content": [{"type": "output_text", "text": "Look:"}]},
    {"type": "function_call", "id": "fc_1", "call_id": "c1", "name": "weather", "arguments": '{"city": "Paris"}'},
    {"type": "function_call", "call_id": "c2", "name": "add", "arguments": "{}"},
    {"type": "function_call_output", "call_id": "c1", "output": "sunny"},
    {"type": "function_call_output", "call_id": "c2", "output": [{"type": "input_text", "text": "3"}]},
]


def ask(
    fields: dict[str, Any], says: str = "hello", **options: Any
) -> tuple[dict[str, Any], list[dict[str, Any]], str, list[str | None]]:
    """The whole answer, the events of the same request, the prompt, and the grammars that the engine got."""
    seen: list[Any] = []

    async def test(server: TestServer) -> None:
        body = {"input": "hi", "max_output_tokens": 500} | fields
        whole = await server.http.post("/v1/responses", json=body)
        assert whole.status_code == 200, whole.text
        Response.model_validate(whole.json(), strict=False)
        events = checked_events_of(await server.http.post("/v1/responses", json=body | {"stream": True}))
        requests = server.engine.requests
        prompt = bytes(requests[0].prompt_token_ids).decode()
        seen.append((whole.json(), events, prompt, [one.sampling.guide for one in requests]))

    given = {"check_guide": Compiler(), "engine": ScriptedEngine({None: says}), "limits": WIDE} | options
    with_server(test, chat_template=SHOWS_TOOLS, **given)
    return seen[0]


def refusal(fields: dict[str, Any]) -> tuple[int, str, str]:
    """Status, type and message of a refusal."""
    seen: list[Any] = []

    async def test(server: TestServer) -> None:
        answer = await server.http.post("/v1/responses", json={"input": "hi"} | fields)
        error = answer.json()["error"]
        seen.append((answer.status_code, error["type"], error["message"]))
        assert not server.engine.requests

    with_server(test, limits=WIDE, chat_template=SHOWS_TOOLS, check_guide=Compiler())
    return seen[0]


def shapes_of(output: list[dict[str, Any]]) -> list[Any]:
    """Each item without its names: a text, or a function and its arguments."""
    return [
        item["content"][0]["text"] if item["type"] == "message" else (item["name"], json.loads(item["arguments"]))
        for item in output
    ]


def test_the_tools_are_shown_and_the_calls_are_items() -> None:
    answer, events, prompt, grammars = ask({"tools": TOOLS}, f"Look: {HERMES(CALL)}\n{HERMES(ADDS)}")
    assert prompt.startswith('T:{"name": "weather", "parameters": {"type": "object"')
    assert '"description": "Tells the weather"}' in prompt and grammars == [None, None]
    paris = ("weather", {"city": "Paris"})
    assert shapes_of(answer["output"]) == ["Look: ", paris, ("add", {"a": [1, 2]})]
    assert shapes_of(events[-1]["response"]["output"]) == shapes_of(answer["output"])
    for output in (answer["output"], events[-1]["response"]["output"]):
        assert [item["status"] for item in output] == ["completed"] * 3
        assert len({item["id"] for item in output} | {item["call_id"] for item in output[1:]}) == 5
    assert (answer["status"], answer["tool_choice"], answer["parallel_tool_calls"]) == ("completed", "auto", True)
    assert answer["tools"] == [
        WEATHER | {"strict": False}, ADD | {"description": None, "parameters": {"type": "object", "properties": {}}},
    ]  # fmt: skip


def test_a_stream_tells_each_item_from_its_beginning_to_its_end() -> None:
    _, events, _, _ = ask({"tools": TOOLS}, f"Look: {HERMES(CALL)}{HERMES(ADDS)}")
    kinds: list[str] = []
    for event in events:
        kind = event["type"].removeprefix("response.")
        if not kinds or kinds[-1] != kind:
            kinds.append(kind)
    text = ["content_part.added", "output_text.delta", "output_text.done", "content_part.done"]
    call = ["function_call_arguments.delta", "function_call_arguments.done"]
    item = ["output_item.added", None, "output_item.done"]
    assert kinds == [
        "created", "in_progress", *(kind for inner in (text, call, call) for one in item
                                    for kind in (inner if one is None else [one])), "completed",
    ]  # fmt: skip
    output = events[-1]["response"]["output"]
    for place, ended in enumerate(output):
        own = [event for event in events if event.get("output_index") == place]
        assert {event["item_id"] for event in own if "item_id" in event} == {ended["id"]}
        begun = own[0]["item"]
        assert own[-1]["item"] == ended and begun["id"] == ended["id"] and begun["status"] == "in_progress"
        pieces = [event["delta"] for event in own if event["type"].endswith(".delta")]
        if ended["type"] == "function_call":
            assert begun == ended | {"arguments": "", "status": "in_progress"}
            assert "".join(pieces) == ended["arguments"] and len(pieces) > 10
            assert own[-2] == own[-2] | {"arguments": ended["arguments"], "name": ended["name"]}
        else:
            assert "".join(pieces) == "Look: "


def test_text_behind_a_call_is_a_message_of_its_own() -> None:
    answer, events, _, _ = ask({"tools": TOOLS}, f"{HERMES(CALL)}that was it")
    assert shapes_of(answer["output"]) == [("weather", {"city": "Paris"}), "that was it"]
    assert shapes_of(events[-1]["response"]["output"]) == shapes_of(answer["output"])


def test_earlier_items_reach_the_template_as_one_turn_of_the_assistant() -> None:
    _, _, prompt, _ = ask({"input": ITEMS, "instructions": "be brief"})
    turn = 'a:<think>hm</think>Look:<tool_call>weather={"city": "Paris"}<tool_call>add={};'
    assert prompt == f"s:be brief;u:hi;{turn}t:sunny;t:3;"


def test_an_answer_can_be_sent_back_as_it_came() -> None:
    answer, _, _, _ = ask({"tools": TOOLS}, f"Look:{HERMES(CALL)}")
    result = {"type": "function_call_output", "call_id": answer["output"][-1]["call_id"], "output": "sunny"}
    items = [{"role": "user", "content": "hi"}, *answer["output"], result]
    _, _, prompt, _ = ask({"input": items})
    assert prompt == 'u:hi;a:Look:<tool_call>weather={"city": "Paris"};t:sunny;'


@pytest.mark.parametrize(
    ("choice", "names"),
    [("required", ["weather", "add"]), ({"type": "function", "name": "weather"}, ["weather"])],
)
def test_a_call_that_must_come_has_the_grammar_that_chat_has(choice: Any, names: list[str]) -> None:
    answer, events, _, grammars = ask({"tools": TOOLS, "tool_choice": choice}, HERMES(CALL))
    for grammar in grammars:
        assert grammar is not None
        assert [name for name in ("weather", "add") if f'\\"name\\": \\"{name}\\"' in grammar] == names
    assert shapes_of(answer["output"]) == [("weather", {"city": "Paris"})]
    assert (answer["status"], answer["tool_choice"]) == ("completed", choice)
    assert events[-1]["type"] == "response.completed"


def test_none_leaves_the_tools_out_and_one_call_is_one_call() -> None:
    answer, _, prompt, _ = ask({"tools": TOOLS, "tool_choice": "none"}, HERMES(CALL))
    assert prompt == "u:hi;" and answer["output"][0]["content"][0]["text"] == HERMES(CALL)
    answer, _, _, _ = ask({"tools": TOOLS, "parallel_tool_calls": False}, HERMES(CALL) * 2)
    assert shapes_of(answer["output"]) == [("weather", {"city": "Paris"})]
    assert answer["parallel_tool_calls"] is False


def test_a_call_that_is_cut_is_incomplete() -> None:
    answer, events, _, _ = ask({"tools": TOOLS, "max_output_tokens": 45}, f"{HERMES(CALL)}")
    for found in (answer, events[-1]["response"]):
        assert (found["status"], found["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
        (item,) = found["output"]
        assert (item["status"], item["name"]) == ("incomplete", "weather") and '{"city"'.startswith(item["arguments"])


def test_log_probabilities_are_those_of_the_text() -> None:
    fields = {"tools": TOOLS, "include": ["message.output_text.logprobs"], "temperature": 0}
    answer, events, _, _ = ask(fields, f"Look: {HERMES(CALL)}done")
    texts = [item["content"][0] for item in answer["output"] if item["type"] == "message"]
    assert [one["token"] for one in texts[0]["logprobs"]] == list("Look: ")
    assert [one["token"] for one in texts[1]["logprobs"]] == [*"done", "</s>"]
    streamed = [one for event in events if event["type"] == "response.output_text.delta" for one in event["logprobs"]]
    assert streamed == texts[0]["logprobs"] + texts[1]["logprobs"]


@pytest.mark.parametrize(
    ("fields", "kind", "words"),
    [
        ({"tools": [{"type": "web_search"}]}, "validation", "`tools[0]` is of type 'web_search', which is not served"),
        ({"tools": [WEATHER, {"type": "mcp", "server_label": "x"}]}, "validation", "`tools[1]` is of type 'mcp'"),
        ({"tools": [{"type": "custom", "name": "x"}]}, "validation", "type function is, which the client runs"),
        ({"tools": [5]}, "validation", "`tools[0]` is of type 'None'"),
        ({"tools": [WEATHER | {"defer_loading": True}]}, "validation", "`tools[0].defer_loading` is not supported"),
        ({"tools": [{"type": "function", "function": WEATHER}]}, "tool_error", "`tools[0].name` must be"),
        ({"tools": [WEATHER | {"parameters": []}]}, "tool_error", "`tools[0].parameters` of 'weather' must be a JSON"),
        ({"tools": [WEATHER, WEATHER]}, "tool_error", "more than one tool with the name 'weather'"),
        ({"tools": TOOLS, "tool_choice": "weather"}, "validation", "`tool_choice` must be auto, none, required or"),
        ({"tools": TOOLS, "tool_choice": {"type": "file_search"}}, "tool_error", "`tool_choice` must be auto"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "name": "x"}}, "tool_error", "name x not found"),
        ({"tool_choice": "required"}, "tool_error", "there are no `tools`"),
        ({"input": ITEMS[:2] + ITEMS[5:]}, "validation", "`input[2]` is the output of the call 'c1', which no"),
        ({"input": [{"type": "function_call", "call_id": "c", "name": "x"}]}, "validation", "must have `arguments`"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "validation", "`input[0]` is of type 'item_reference'"),
        (
            {"input": [{"type": "reasoning", "summary": [], "encrypted_content": "gA"}]},
            "validation",
            "`input[0]` is encrypted reasoning",
        ),
    ],
)
def test_what_cannot_be_done_with_tools_is_refused_by_name(fields: dict[str, Any], kind: str, words: str) -> None:
    status, found, message = refusal(fields)
    assert (status, found) == (422, kind) and words in message


@pytest.mark.parametrize("choice", ["auto", "required"])
def test_openai_reads_the_same_calls_from_a_stream(choice: Any) -> None:
    async def test(server: TestServer) -> None:
        async with openai.AsyncOpenAI(base_url=f"{server.base_url}/v1", api_key="x", max_retries=0) as client:
            asked: Any = {"model": "tgi", "input": "hi", "tools": TOOLS, "tool_choice": choice}
            async with client.responses.stream(**asked, max_output_tokens=500) as stream:
                arguments = [
                    event.snapshot async for event in stream if event.type == "response.function_call_arguments.delta"
                ]
                final = await stream.get_final_response()
        calls = [item for item in final.output if item.type == "function_call"]
        assert [(call.name, call.arguments) for call in calls] == [("weather", '{"city": "Paris"}')]
        assert arguments[-1] == calls[0].arguments and final.output_text == ("Look:" if choice == "auto" else "")

    says = "Look:" * (choice == "auto") + HERMES(CALL)
    with_server(
        test, engine=ScriptedEngine({None: says}), limits=WIDE, live=True, chat_template=SHOWS_TOOLS,
        check_guide=Compiler(),
    )  # fmt: skip
