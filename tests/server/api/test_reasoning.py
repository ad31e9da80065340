"""What a model thinks, told apart in chats and in responses where the server is started so."""

import json
from typing import Any

import pytest
from response_events import checked_events_of
from scripted_engine import ScriptedEngine, TestServer, with_server
from tool_conversations import CALL, HERMES, SHOWS_TOOLS, WEATHER, WIDE, Compiler

SAYS = "<think>\nhm\n</think>\n\nParis"
OPENS = "{% for m in messages %}{{ m.content }}{% endfor %}<think>\n"


def ask(path: str, fields: dict[str, Any], says: str = SAYS, parser: str = "think", **options: Any) -> Any:
    """The answer to a request; for a stream the response itself."""
    seen: list[Any] = []

    async def test(server: TestServer) -> None:
        given = {"messages": [{"role": "user", "content": "hi"}]} if "chat" in path else {"input": "hi"}
        answer = await server.http.post(path, json=given | fields)
        assert answer.status_code == 200, answer.text
        seen.append(answer if fields.get("stream") else answer.json())

    given = {"engine": ScriptedEngine({None: says}), "limits": WIDE, "check_guide": Compiler()} | options
    with_server(test, reasoning_parser=parser, **given)
    return seen[0]


def message_of(fields: dict[str, Any], says: str = SAYS, **options: Any) -> dict[str, Any]:
    message: dict[str, Any] = ask("/v1/chat/completions", fields, says, **options)["choices"][0]["message"]
    assert message.pop("reasoning", None) == message.get("reasoning_content")
    return message


@pytest.mark.parametrize(
    ("says", "options", "message"),
    [
        (SAYS, {}, {"content": "Paris", "reasoning_content": "hm"}),
        (SAYS, {"parser": "qwen3"}, {"content": "Paris", "reasoning_content": "hm"}),
        (SAYS, {"parser": "none"}, {"content": SAYS}),
        ("Paris", {}, {"content": "Paris"}),
        ("hm</think>Paris", {}, {"content": "hm</think>Paris"}),
        ("hm</think>Paris", {"chat_template": OPENS}, {"content": "Paris", "reasoning_content": "hm"}),
        ("hm</think>Paris", {"parser": "deepseek_r1"}, {"content": "Paris", "reasoning_content": "hm"}),
        ("<think>only thoughts", {}, {"content": None, "reasoning_content": "only thoughts"}),
    ],
)
def test_a_chat_shows_thoughts_apart(says: str, options: dict[str, Any], message: dict[str, Any]) -> None:
    assert message_of({}, says, **options) == {"role": "assistant"} | message


def test_thoughts_may_be_left_out_and_are_not_looked_for_in_what_has_a_form() -> None:
    assert message_of({"include_reasoning": False}) == {"role": "assistant", "content": "Paris"}
    says = '{"a": "</think>"}'
    fields = {"response_format": {"type": "json_object"}}
    assert message_of(fields, says, parser="deepseek_r1") == {"role": "assistant", "content": says}


def test_a_chats_stream_has_the_same_thoughts() -> None:
    answer = ask("/v1/chat/completions", {"stream": True}, says="<think>so it is</think>Paris")
    deltas = [
        json.loads(line[6:])["choices"][0]["delta"] for line in answer.text.split("\n\n") if line.startswith("data: {")
    ]
    assert "".join(delta.get("reasoning_content", "") for delta in deltas) == "so it is"
    assert "".join(delta.get("content", "") for delta in deltas) == "Paris"
    thoughts = [delta for delta in deltas if "reasoning" in delta]
    assert len(thoughts) > 3 and all(set(delta) == {"reasoning", "reasoning_content"} for delta in thoughts)


@pytest.mark.parametrize("includes", [{}, {"include": ["message.output_text.logprobs"], "temperature": 0}])
def test_responses_have_an_item_of_thoughts_and_count_them(includes: dict[str, Any]) -> None:
    fields = {"tools": [{"type": "function", **WEATHER["function"]}], **includes}
    says = f"<think>\nhm\n</think>\n\nParis{HERMES(CALL)}"
    answer = ask("/v1/responses", fields, says, chat_template=SHOWS_TOOLS)
    events = checked_events_of(ask("/v1/responses", fields | {"stream": True}, says, chat_template=SHOWS_TOOLS))
    for found in (answer, events[-1]["response"]):
        thought, message, call = found["output"]
        assert thought["type"] == "reasoning" and thought["content"] == [{"type": "reasoning_text", "text": "hm"}]
        assert (message["content"][0]["text"], call["name"]) == ("Paris", "weather")
        assert [one["token"] for one in message["content"][0]["logprobs"]] == list("Paris" if includes else "")
        assert found["usage"]["output_tokens_details"]["reasoning_tokens"] == len("<think>\nhm\n</think>")
    kinds = [event["type"].removeprefix("response.") for event in events if event.get("output_index") == 0]
    assert kinds == [
        "output_item.added", "content_part.added", "reasoning_text.delta", "reasoning_text.delta",
        "reasoning_text.done", "content_part.done", "output_item.done",
    ]  # fmt: skip


def test_only_thoughts_that_are_cut_are_an_incomplete_item() -> None:
    answer = ask("/v1/responses", {"max_output_tokens": 10}, says="<think>on and on")
    (thought,) = answer["output"]
    assert (answer["status"], thought["status"], thought["content"][0]["text"]) == ("incomplete", "incomplete", "on")
