"""/v1/responses: the shapes that the SDKs read, whole and as events, and what is refused."""

from typing import Any

import pytest
from openai.types.responses import Response
from response_events import checked_events_of, events_of
from scripted_engine import EOS, ScriptedEngine, TestServer, with_server


def test_a_whole_answer_is_one_message_and_the_sdks_type() -> None:
    async def test(server: TestServer) -> None:
        body = {"model": "pirate", "input": "hi", "metadata": {"a": "b"}, "max_output_tokens": 9, "store": True}
        answer = await server.http.post("/v1/responses", json=body)
        assert answer.headers["x-adapter-id"] == "pirate"
        found = Response.model_validate(answer.json(), strict=False)
        assert (found.output_text, found.status, found.model, found.metadata) == (
            "arr",
            "completed",
            "pirate",
            {"a": "b"},
        )
        assert found.usage is not None
        assert found.usage.total_tokens == found.usage.input_tokens + found.usage.output_tokens
        assert found.usage.output_tokens == 4
        assert answer.json()["store"] is False
        assert server.engine.requests[0].adapter_id == "pirate"

    with_server(test)


def test_an_answer_that_ends_at_the_limit_is_incomplete() -> None:
    async def test(server: TestServer) -> None:
        for stream in (False, True):
            body = {"input": "hi", "max_output_tokens": 5, "stream": stream}
            answer = await server.http.post("/v1/responses", json=body)
            found = events_of(answer)[-1]["response"] if stream else answer.json()
            assert (found["status"], found["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
            assert found["output"][0]["content"][0]["text"] == "hello"

    with_server(test)


def test_instructions_and_items_become_the_conversation() -> None:
    async def test(server: TestServer) -> None:
        items = [
            {"role": "user", "content": [{"type": "input_text", "text": "a"}]},
            {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "b"}]},
            {"role": "user", "content": "c"},
        ]
        await server.http.post("/v1/responses", json={"instructions": "s", "input": items})
        assert bytes(server.engine.requests[0].prompt_token_ids).decode() == "s:s;u:a;a:b;u:c;a:"

    with_server(test)


def test_a_stream_is_the_named_events_that_the_sdks_know() -> None:
    async def test(server: TestServer) -> None:
        answer = await server.http.post("/v1/responses", json={"model": "json", "input": "hi", "stream": True})
        assert answer.headers["content-type"] == "text/event-stream"
        events = checked_events_of(answer)
        kinds = [event["type"].removeprefix("response.") for event in events]
        first = ["created", "in_progress", "output_item.added", "content_part.added"]
        last = ["output_text.done", "content_part.done", "output_item.done", "completed"]
        assert kinds == first + ["output_text.delta"] * (len(kinds) - 8) + last
        text = "".join(event["delta"] for event in events if event["type"] == "response.output_text.delta")
        assert text == events[-1]["response"]["output"][0]["content"][0]["text"] == '{"a": 1}'

    with_server(test)


@pytest.mark.parametrize("asked", [{"include": ["message.output_text.logprobs"]}, {"top_logprobs": 2}])
def test_the_tokens_come_with_their_log_probabilities_where_they_are_asked_for(asked: dict[str, Any]) -> None:
    async def test(server: TestServer) -> None:
        body = {"model": "pirate", "input": "hi", "temperature": 0, **asked}
        found = Response.model_validate((await server.http.post("/v1/responses", json=body)).json(), strict=False)
        [text] = found.output[0].content  # type: ignore[union-attr]  # a message
        assert [one.token for one in text.logprobs or []] == ["a", "r", "r", "</s>"]
        assert all(one.logprob == -0.25 for one in text.logprobs or [])
        assert {len(one.top_logprobs) for one in text.logprobs or []} == {asked.get("top_logprobs", 0)}
        events = checked_events_of(await server.http.post("/v1/responses", json=body | {"stream": True}))
        deltas = [event for event in events if event["type"] == "response.output_text.delta"]
        streamed = [one for event in deltas for one in event["logprobs"]]
        assert streamed == events[-1]["response"]["output"][0]["content"][0]["logprobs"]
        assert streamed == [one.to_dict() for one in text.logprobs or []]

    with_server(test)


def test_what_chat_takes_besides_openais_fields_is_taken_here_too() -> None:
    async def test(server: TestServer) -> None:
        body = {
            "input": "hi", "top_k": 5, "min_p": 0.1, "repetition_penalty": 1.2, "presence_penalty": 0.5,
            "frequency_penalty": 0.25, "min_tokens": 2, "ignore_eos": True, "stop": " wo", "lora_path": "pirate",
            "chat_template_kwargs": {"suffix": "!"},
        }  # fmt: skip
        answer = await server.http.post("/v1/responses", json=body | {"adapter_id": "json"})
        assert answer.status_code == 422 and "name different adapters" in answer.json()["error"]["message"]
        answer = await server.http.post("/v1/responses", json=body | {"lora_path": None})
        assert answer.json()["output"][0]["content"][0]["text"] == "hello"
        (request,) = server.engine.requests
        assert bytes(request.prompt_token_ids).decode() == "u:hi;a:!"
        sampling = request.sampling
        assert (sampling.top_k, sampling.min_p, sampling.repetition_penalty) == (5, 0.1, 1.2)
        assert (sampling.presence_penalty, sampling.count_penalty) == (0.5, 0.25)
        assert (sampling.min_new_tokens, sampling.ignore_eos) == (2, True)

    with_server(test)


@pytest.mark.parametrize(
    ("effort", "kwargs", "prompt"),
    [("high", {}, "high,"), ("none", {}, "none,False"), ("none", {"enable_thinking": True}, "none,True")],
)
def test_how_much_to_think_is_told_to_the_template(effort: str, kwargs: dict[str, Any], prompt: str) -> None:
    async def test(server: TestServer) -> None:
        more = {"chat_template_kwargs": kwargs}
        await server.http.post("/v1/responses", json={"input": "hi", "reasoning": {"effort": effort}} | more)
        chat = {"messages": [{"role": "user", "content": "hi"}], "reasoning_effort": effort}
        await server.http.post("/v1/chat/completions", json=chat | more)
        prompts = [bytes(request.prompt_token_ids).decode() for request in server.engine.requests]
        assert prompts == [prompt, prompt]

    with_server(test, chat_template="{{ reasoning_effort }},{{ enable_thinking }}")


def test_what_is_never_in_an_answer_may_be_asked_for() -> None:
    async def test(server: TestServer) -> None:
        answer = await server.http.post(
            "/v1/responses", json={"input": "hi", "include": ["reasoning.encrypted_content"]}
        )
        assert answer.json()["output"][0]["content"][0]["logprobs"] == []

    with_server(test)


def test_a_stream_that_fails_ends_with_an_error_the_sdks_raise() -> None:
    async def test(server: TestServer) -> None:
        answer = await server.http.post("/v1/responses", json={"input": "hi", "stream": True})
        *_, failed, error = events_of(answer)
        assert (failed["type"], failed["response"]["status"]) == ("response.failed", "failed")
        assert error["error_type"] == "generation" and "boom" in error["error"]["message"]

    with_server(test, engine=ScriptedEngine(fail_at=2))


def test_an_answer_of_nothing_is_an_empty_text() -> None:
    async def test(server: TestServer) -> None:
        answer = (await server.http.post("/v1/responses", json={"input": "hi"})).json()
        assert answer["output"][0]["content"][0]["text"] == ""

    with_server(test, engine=ScriptedEngine(token_ids=[EOS]))


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"background": True}, "background"),
        ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"top_logprobs": 21}, "top_logprobs"),
        ({"include": ["message.output_text.moods"]}, "message.output_text.moods"),
        ({"input": []}, "input"),
        ({"input": ""}, "input"),
        ({"input": 5}, "input"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input_image"),
        ({"input": [{"role": "tool", "content": "x"}]}, "role"),
        ({"input": [{"role": "user"}]}, "content"),
        ({"input": [{"type": "function_call_output", "output": "x"}]}, "function_call_output"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"metadata": {"a": 1}}, "metadata"),
    ],
)
def test_what_cannot_be_answered_is_refused_by_name(fields: dict[str, Any], named: str) -> None:
    async def test(server: TestServer) -> None:
        answer = await server.http.post("/v1/responses", json={"input": "hi"} | fields)
        assert answer.status_code == 422 and named in answer.json()["error"]["message"]
        assert not server.engine.requests

    with_server(test)


def test_an_unknown_model_is_404_before_a_stream_begins() -> None:
    async def test(server: TestServer) -> None:
        answer = await server.http.post("/v1/responses", json={"model": "no", "input": "hi", "stream": True})
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")

    with_server(test)


def test_null_is_the_same_as_absent() -> None:
    async def test(server: TestServer) -> None:
        nulls = dict.fromkeys(
            ("model", "instructions", "max_output_tokens", "temperature", "top_p", "stream", "text", "tools",
             "tool_choice", "parallel_tool_calls", "metadata", "store", "user", "previous_response_id", "include",
             "top_logprobs")
        )  # fmt: skip
        answer = await server.http.post("/v1/responses", json={"input": "hi", **nulls})
        assert answer.json()["output"][0]["content"][0]["text"] == "hello world"

    with_server(test)
