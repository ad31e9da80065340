"""POST /v1/chat/completions, true to OpenAI: whole answers, streams, fields, names, refusals."""

import asyncio
import json
from typing import Any

import httpx
import pytest
from scripted_engine import BOS, EOS, ScriptedEngine, TestServer, with_server

USER = [{"role": "user", "content": "hi"}]


async def chat(server: TestServer, messages: Any = USER, **fields: Any) -> httpx.Response:
    return await server.http.post("/v1/chat/completions", json={"messages": messages, **fields})


async def said(server: TestServer, **fields: Any) -> str:
    answer = await chat(server, **fields)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["message"]["content"])


def events(answer: httpx.Response) -> list[Any]:
    assert answer.headers["content-type"] == "text/event-stream"
    *data, done, rest = answer.text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    return [json.loads(event.removeprefix("data: ")) for event in data]


def prompt_of(server: TestServer) -> str:
    return bytes(server.engine.requests[-1].prompt_token_ids).decode()


def test_a_whole_answer() -> None:
    async def test(server: TestServer) -> None:
        answer = await chat(server)
        body = answer.json()
        assert body["id"].startswith("chatcmpl-") and len(body["id"]) > 20
        assert (body["object"], body["model"]) == ("chat.completion", "tiny-base")
        assert body["created"] > 1_700_000_000
        assert body["choices"] == [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "hello world"},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ]
        assert body["usage"] == {
            "prompt_tokens": 7,
            "completion_tokens": 12,
            "total_tokens": 19,
            "prompt_tokens_details": {"cached_tokens": 0},
        }
        assert prompt_of(server) == "u:hi;a:"  # no start token: the template writes its own
        assert answer.headers["x-model-id"] == "tiny-base"
        assert (await chat(server)).json()["id"] != body["id"]

    with_server(test)


def test_a_stream_has_the_role_once_then_the_text_then_the_reason() -> None:
    async def test(server: TestServer) -> None:
        chunks = events(await chat(server, stream=True, model="pirate"))
        assert [chunk["choices"][0]["delta"] for chunk in chunks] == [
            {"role": "assistant", "content": ""},
            {"content": "a"},
            {"content": "r"},
            {"content": "r"},
            {},
        ]
        assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * 4 + ["stop"]
        assert len({chunk["id"] for chunk in chunks}) == 1
        assert {chunk["model"] for chunk in chunks} == {"pirate"}
        assert all("usage" not in chunk for chunk in chunks)

    with_server(test)


def test_a_stream_ends_with_the_usage_when_asked() -> None:
    async def test(server: TestServer) -> None:
        chunks = events(await chat(server, stream=True, max_tokens=3, stream_options={"include_usage": True}))
        assert [chunk["usage"] for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
        assert chunks[-1]["choices"] == []
        assert chunks[-1]["usage"] == {
            "prompt_tokens": 7,
            "completion_tokens": 3,
            "total_tokens": 10,
            "prompt_tokens_details": {"cached_tokens": 0},
        }
        assert chunks[-2]["choices"][0]["finish_reason"] == "length"

    with_server(test)


@pytest.mark.parametrize(
    ("fields", "adapter"),
    [
        ({}, None),
        ({"model": None}, None),
        ({"model": ""}, None),
        ({"model": "tgi"}, None),
        ({"model": "dummy"}, None),
        ({"model": "http://127.0.0.1:3000/v1/"}, None),
        ({"model": "tiny-base"}, None),
        ({"model": "pirate"}, "pirate"),
        ({"model": "tiny-base:pirate"}, "pirate"),
        ({"adapter_id": "pirate"}, "pirate"),
        ({"model": "tiny-base", "adapter_id": "json"}, "json"),
        ({"model": "pirate", "adapter_id": "pirate"}, "pirate"),
        ({"model": "pirate", "adapter_id": ""}, "pirate"),
    ],
)
def test_model_names(fields: dict[str, Any], adapter: str | None) -> None:
    async def test(server: TestServer) -> None:
        answer = await chat(server, **fields)
        assert server.engine.requests[-1].adapter_id == adapter
        assert answer.json()["model"] == (adapter or "tiny-base")
        assert answer.headers.get("x-adapter-id") == adapter

    with_server(test)


@pytest.mark.parametrize(
    "fields",
    [
        {"model": "pirat"},
        {"model": "other-base:pirate"},
        {"model": "tiny-base:"},
        {"model": "gpt-4o"},
        {"model": "../etc"},
        {"model": "x" * 5000},
        {"adapter_id": "none"},
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_an_unknown_model_is_404_and_never_the_base(fields: dict[str, Any], stream: bool) -> None:
    async def test(server: TestServer) -> None:
        answer = await chat(server, stream=stream, **fields)
        assert answer.status_code == 404
        assert answer.json()["error"]["code"] == "model_not_found"
        assert answer.json()["error_type"] == "adapter_not_found"
        assert not server.engine.requests

    with_server(test)


def test_two_different_adapters_at_once_are_refused() -> None:
    async def test(server: TestServer) -> None:
        assert (await chat(server, model="pirate", adapter_id="json")).status_code == 422

    with_server(test)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("fields", "text", "reason"),
    [
        ({"stop": "o w"}, "hell", "stop"),
        ({"stop": ["zzz", "world", "rld"]}, "hello ", "stop"),
        ({"stop": ["world"], "include_stop_str_in_output": True}, "hello world", "stop"),
        ({"stop": "worlds"}, "hello world", "stop"),
        ({"stop": "o", "max_tokens": 5}, "hell", "stop"),
        ({"stop": "or", "max_tokens": 8}, "hello wo", "length"),
        ({"max_completion_tokens": 4}, "hell", "length"),
        ({"max_tokens": 9, "max_completion_tokens": 4}, "hell", "length"),
        ({"skip_special_tokens": False}, "hello world", "stop"),
    ],
)
def test_the_stop_text_is_not_part_of_the_answer(fields: dict[str, Any], text: str, reason: str, stream: bool) -> None:
    async def test(server: TestServer) -> None:
        answer = await chat(server, stream=stream, **fields)
        if stream:
            choices = [chunk["choices"][0] for chunk in events(answer)]
            found = "".join(choice["delta"].get("content", "") for choice in choices), choices[-1]["finish_reason"]
        else:
            choice = answer.json()["choices"][0]
            found = choice["message"]["content"], choice["finish_reason"]
        assert found == (text, reason)

    with_server(test)


def test_n_answers_come_from_different_seeds_and_share_the_prompts_count() -> None:
    async def test(server: TestServer) -> None:
        body = (await chat(server, n=3, seed=7)).json()
        assert [choice["index"] for choice in body["choices"]] == [0, 1, 2]
        assert [request.sampling.seed for request in server.engine.requests] == [7, 8, 9]
        assert body["usage"] == {
            "prompt_tokens": 7,
            "completion_tokens": 36,
            "total_tokens": 43,
            "prompt_tokens_details": {"cached_tokens": 0},
        }
        await chat(server, n=2)
        assert len({request.sampling.seed for request in server.engine.requests}) == 5

    with_server(test)


def test_n_streams_are_told_apart_by_their_index() -> None:
    async def test(server: TestServer) -> None:
        chunks = events(await chat(server, n=3, stream=True, stream_options={"include_usage": True}))
        choices = [chunk["choices"][0] for chunk in chunks[:-1]]
        for index in range(3):
            own = [choice for choice in choices if choice["index"] == index]
            assert own[0]["delta"] == {"role": "assistant", "content": ""}
            assert "".join(choice["delta"].get("content", "") for choice in own) == "hello world"
            assert [choice["finish_reason"] for choice in own if choice["finish_reason"]] == ["stop"]
        assert chunks[-1]["usage"] == {
            "prompt_tokens": 7,
            "completion_tokens": 36,
            "total_tokens": 43,
            "prompt_tokens_details": {"cached_tokens": 0},
        }

    with_server(test)


def test_parameters_reach_the_engine() -> None:
    async def test(server: TestServer) -> None:
        await chat(
            server, temperature=0.5, top_p=0.9, top_k=7, min_p=0.1, typical_p=0.8, seed=-1, frequency_penalty=0.5,
            presence_penalty=-0.5, repetition_penalty=1.1, logit_bias={"65": 3, "66": -100.0}, stop_token_ids=[5],
            ignore_eos=True, max_tokens=11, user="me", store=True, metadata={}, reasoning_effort="low",
        )  # fmt: skip
        sampling = server.engine.requests[-1].sampling
        assert sampling.do_sample
        assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.5, 0.9, 7)
        assert (sampling.min_p, sampling.typical_p, sampling.repetition_penalty) == (0.1, 0.8, 1.1)
        assert (sampling.count_penalty, sampling.presence_penalty, sampling.frequency_penalty) == (0.5, -0.5, 0)
        assert (sampling.seed, sampling.logit_bias) == (2**64 - 1, {65: 3.0, 66: -100.0})
        assert (sampling.stop_token_ids, sampling.ignore_eos, sampling.max_new_tokens) == ((5,), True, 11)

    with_server(test)


def test_without_parameters_tokens_are_drawn_at_temperature_one_and_zero_is_greedy() -> None:
    async def test(server: TestServer) -> None:
        await chat(server, top_p=1, top_k=-1, min_p=None, typical_p=1)
        plain = server.engine.requests[-1].sampling
        assert (plain.do_sample, plain.temperature, plain.top_p, plain.top_k) == (True, 1.0, 1.0, 0)
        assert plain.max_new_tokens == 53  # what is left
        await chat(server, temperature=0, top_p=0.5, top_k=3)
        assert not server.engine.requests[-1].sampling.do_sample

    with_server(test)


def test_logprobs_have_the_tokens_bytes_and_the_likeliest_in_their_place() -> None:
    async def test(server: TestServer) -> None:
        choice = (await chat(server, temperature=0, logprobs=True, top_logprobs=2)).json()["choices"][0]
        first = choice["logprobs"]["content"][0]
        assert first["token"] == "h" and first["bytes"] == [104] and first["logprob"] == -0.25
        assert first["top_logprobs"] == [
            {"token": "h", "logprob": -0.25, "bytes": [104]},
            {"token": "a", "logprob": -9999.0, "bytes": [97]},
        ]
        assert len(choice["logprobs"]["content"]) == 12
        plain = (await chat(server, logprobs=True)).json()["choices"][0]["logprobs"]["content"][0]
        assert plain["top_logprobs"] == []

    with_server(test)


def test_a_streams_logprobs_are_those_of_the_whole_answer() -> None:
    async def test(server: TestServer) -> None:
        fields = {"temperature": 0, "logprobs": True, "top_logprobs": 20, "stop": "world"}
        whole = (await chat(server, **fields)).json()["choices"][0]["logprobs"]["content"]
        chunks = events(await chat(server, stream=True, **fields))
        parts = [chunk["choices"][0]["logprobs"] for chunk in chunks]
        assert [one for part in parts if part for one in part["content"]] == whole

    with_server(test)


@pytest.mark.parametrize(
    ("messages", "fields", "prompt"),
    [
        ([{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}], {}, "u:ab;a:"),
        ([*USER, {"role": "assistant", "content": "so "}], {}, "u:hi;a:so "),
        ([*USER, {"role": "assistant", "content": "so"}], {"add_generation_prompt": True}, "u:hi;a:so;a:"),
        ([*USER, {"role": "assistant", "content": "so"}], {"continue_final_message": False}, "u:hi;a:so;a:"),
        ([*USER, {"role": "assistant", "content": "so"}], {"continue_final_message": True}, "u:hi;a:so"),
        (USER, {"add_generation_prompt": False}, "u:hi;"),
        (USER, {"chat_template_kwargs": {"suffix": "!"}}, "u:hi;a:!"),
        (USER, {"tools": [], "tool_choice": "auto", "response_format": {"type": "text"}}, "u:hi;a:"),
        ([{"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}, *USER], {}, 'a:[{"id": "1"}];u:hi;a:'),
    ],
)
def test_the_prompt_is_what_the_template_makes_of_the_messages(
    messages: list[Any], fields: dict[str, Any], prompt: str
) -> None:
    async def test(server: TestServer) -> None:
        answer = await chat(server, messages, **fields)
        assert answer.status_code == 200, answer.text
        assert prompt_of(server) == prompt

    with_server(test)


def test_the_tokenizers_start_token_is_added_when_asked() -> None:
    async def test(server: TestServer) -> None:
        await chat(server, add_special_tokens=True)
        assert server.engine.requests[-1].prompt_token_ids[0] == BOS

    with_server(test)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"messages": []}, "must not be empty"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [{"content": "hi"}]}, "missing field `role`"),
        ({"messages": [{"role": "user"}]}, "must have `content`"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "u"}}]}]}, "image_url"),
        ({"messages": [{"role": "bad", "content": "x"}]}, "no such role"),
        ({"temperature": -0.1}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"min_p": 2}, "min_p"),
        ({"n": 0}, "`n`"),
        ({"n": 1000}, "`n`"),
        ({"frequency_penalty": 2.5}, "frequency_penalty"),
        ({"presence_penalty": -3}, "presence_penalty"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"999": 1}}, "999"),
        ({"logit_bias": {"1": 101}}, "-100 to 100"),
        ({"logit_bias": [1.0]}, "logit_bias"),
        ({"stop_token_ids": [-1]}, "stop_token_ids"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop"),
        ({"stop": 5}, "stop"),
        ({"stop": ""}, "empty string"),
        ({"top_logprobs": 3}, "needs `logprobs`"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"tools": [{"type": "function"}]}, "`tools[0]` must be"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"min_tokens": 100}, "min_tokens"),
        ({"use_beam_search": True}, "use_beam_search"),
        ({"cache_salt": "a"}, "cache_salt"),
        ({"echo": True}, "echo"),
        ({"chat_template": "x"}, "chat_template"),
        ({"continue_final_message": True}, "continue_final_message"),
        ({"max_tokens": 0}, "max_new_tokens"),
        ({"max_tokens": "3"}, "max_tokens"),
        ({"messages": [{"role": "user", "content": "x" * 60}]}, "must be <= 60"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_refusals_have_a_status_and_an_object_that_names_the_field(
    fields: dict[str, Any], words: str, stream: bool
) -> None:
    async def test(server: TestServer) -> None:
        answer = await server.http.post("/v1/chat/completions", json={"messages": USER, "stream": stream, **fields})
        assert answer.status_code == 422, answer.text
        assert words in answer.json()["error"]["message"]
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
        assert not server.engine.requests

    with_server(test)


def test_a_model_without_a_template_says_so() -> None:
    async def test(server: TestServer) -> None:
        answer = await chat(server)
        assert (answer.status_code, answer.json()["error_type"]) == (422, "template_error")
        assert "no chat template" in answer.json()["error"]["message"]

    with_server(test, chat_template=None)


def test_a_failure_inside_a_stream_is_an_event_and_then_done() -> None:
    async def test(server: TestServer) -> None:
        *chunks, error = events(await chat(server, stream=True))
        assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == "hel"
        assert error["error_type"] == error["error"]["type"] == "generation"
        assert "boom" in error["error"]["message"]
        await server.until_idle()

    with_server(test, engine=ScriptedEngine(fail_at=3))


@pytest.mark.parametrize("stream", [False, True])
def test_the_failure_of_one_of_n_ends_them_all(stream: bool) -> None:
    async def test(server: TestServer) -> None:
        answer = await chat(server, n=3, stream=stream)
        assert answer.status_code == 424
        await server.until_idle()

    with_server(test, engine=ScriptedEngine(fail_at=0))


@pytest.mark.parametrize("stream", [False, True])
def test_more_than_the_permits_is_429(stream: bool) -> None:
    async def test(server: TestServer) -> None:
        waiting = asyncio.create_task(chat(server))
        while not server.engine.num_running:
            await asyncio.sleep(0.001)
        answer = await chat(server, n=2, stream=stream)
        assert answer.status_code == 429 and answer.headers["retry-after"] == "1"
        assert server.engine.gate is not None
        server.engine.gate.set()
        assert (await waiting).status_code == 200
        await server.until_idle()

    with_server(test, engine=ScriptedEngine(gate=asyncio.Event()), max_concurrent_requests=2)


def test_a_stream_begins_although_its_first_token_is_late() -> None:
    async def test(server: TestServer) -> None:
        assert server.engine.gate is not None
        async with server.http.stream("POST", "/v1/chat/completions", json={"messages": USER, "stream": True}) as got:
            assert got.status_code == 200
            server.engine.gate.set()
            assert '"finish_reason":"stop"' in (await got.aread()).decode()

    with_server(test, engine=ScriptedEngine(gate=asyncio.Event()), live=True)


def test_a_client_that_leaves_takes_all_its_choices_off_the_engine() -> None:
    async def test(server: TestServer) -> None:
        for stream in (True, False):
            leaving = asyncio.create_task(chat(server, stream=stream, n=3))
            while server.engine.num_running < 3:
                await asyncio.sleep(0.001)
            leaving.cancel()
            await asyncio.gather(leaving, return_exceptions=True)
            await server.until_idle()
        assert len(server.engine.aborted) == 6

    with_server(test, engine=ScriptedEngine(gate=asyncio.Event(), gate_at=2), live=True)


def test_special_tokens_are_shown_when_asked() -> None:
    async def test(server: TestServer) -> None:
        assert await said(server, skip_special_tokens=False) == "<s>a"
        assert await said(server) == "a"

    with_server(test, engine=ScriptedEngine(token_ids=[BOS, 97, EOS]))
