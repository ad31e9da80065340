"""Odd values in fields that are well formed: served exactly, or refused by name before anything is generated."""

import json
import logging
import time
from typing import Any

import httpx
import pytest
from scripted_engine import EOS, READY, ScriptedEngine, TestServer, with_server

from loraplex_server.api.schemas.openai import ChatBody, CompletionBody
from loraplex_server.api.schemas.tgi import GenerateParameters

USER = [{"role": "user", "content": "hi"}]
HOSTILE = "a\x00b\ufeffc\u202ed\u200be"  # NUL, byte order mark, right-to-left override, zero-width space
# What a refusal may take before anything was tokenised; a thousand times what it does take.
QUICK_S = 20.0


async def refused(server: TestServer, path: str, body: dict[str, Any], words: str) -> None:
    started = time.monotonic()
    answer = await server.http.post(path, json=body)
    assert time.monotonic() - started < QUICK_S
    text = answer.json()["error"]
    text = text["message"] if isinstance(text, dict) else text
    assert (answer.status_code, answer.json()["error_type"]) == (422, "validation"), answer.text
    assert words in text and len(text) < 1000
    assert not server.engine.requests


def content_of(answer: httpx.Response) -> str:
    return str(answer.json()["choices"][0]["message"]["content"])


def test_every_field_null_at_once_is_the_same_as_absent() -> None:
    async def test(server: TestServer) -> None:
        nulls = dict.fromkeys(GenerateParameters.model_fields)
        answer = await server.http.post("/generate", json={"inputs": "hi", "parameters": nulls, "stream": None})
        assert answer.json() == {"generated_text": "hello world"}
        nulls = dict.fromkeys(ChatBody.model_fields) | {"messages": USER}
        assert content_of(await server.http.post("/v1/chat/completions", json=nulls)) == "hello world"
        nulls = dict.fromkeys(CompletionBody.model_fields) | {"prompt": "hi"}
        answer = await server.http.post("/v1/completions", json=nulls)
        assert answer.json()["choices"][0]["text"] == "hello world"

    with_server(test)


@pytest.mark.parametrize("seed", [0, 2**64 - 1])
def test_the_smallest_and_the_largest_seed_work_and_others_are_refused(seed: int) -> None:
    async def test(server: TestServer) -> None:
        answer = await server.generate("hi", seed=seed, do_sample=True, details=True)
        assert answer.json()["details"]["seed"] == seed
        assert server.engine.requests.pop().sampling.seed == seed
        for other in (-1, 2**64):
            await refused(server, "/generate", {"inputs": "hi", "parameters": {"seed": other}}, "seed")

    with_server(test)


def test_the_limit_of_tokens_is_served_and_one_more_is_refused() -> None:
    async def test(server: TestServer) -> None:
        longest = "x" * (READY.max_input_tokens - 1)  # and the start token
        room = READY.max_total_tokens - READY.max_input_tokens
        assert (await server.generate(longest, max_new_tokens=room)).status_code == 200
        server.engine.requests.clear()
        body = {"inputs": longest, "parameters": {"max_new_tokens": room + 1}}
        await refused(server, "/generate", body, f"Given: 40 `inputs` tokens and {room + 1}")
        await refused(server, "/generate", {"inputs": longest + "x", "parameters": {"max_new_tokens": 1}}, "Given: 41")
        for value in (0, -1, 2**63):
            await refused(server, "/generate", {"inputs": "hi", "parameters": {"max_new_tokens": value}}, "max_new")

    with_server(test)


@pytest.mark.parametrize(("truncate", "kept"), [(1, b"t"), (40, b"x" * 38 + b"ut"), (3, b"xut")])
def test_truncating_keeps_the_last_tokens(truncate: int, kept: bytes) -> None:
    async def test(server: TestServer) -> None:
        assert (await server.generate("x" * 100 + "ut", truncate=truncate, max_new_tokens=2)).status_code == 200
        assert bytes(server.engine.requests.pop().prompt_token_ids) == kept
        for value in (0, 41):
            await refused(server, "/generate", {"inputs": "hi", "parameters": {"truncate": value}}, f"Given: {value}")

    with_server(test)


@pytest.mark.parametrize(
    ("path", "body", "words"),
    [
        ("/v1/chat/completions", {"messages": USER, "n": 10**9}, "`n` must be from 1 to"),
        ("/generate", {"inputs": "hi", "parameters": {"best_of": 10**9, "do_sample": True}}, "best_of"),
        ("/generate", {"inputs": "hi", "parameters": {"stop": ["a"] * 500_000}}, "Given: 500000"),
        ("/v1/completions", {"prompt": "hi", "stop": ["a"] * 500_000}, "Given: 500000"),
        ("/generate", {"inputs": "hi", "parameters": {"stop": ["a" * 1_000_000]}}, "at most 1024 characters"),
        ("/generate", {"inputs": "hi", "parameters": {"top_n_tokens": 10**9}}, "top_n_tokens"),
        ("/v1/completions", {"prompt": "hi", "logprobs": 10**9}, "logprobs"),
        ("/v1/completions", {"prompt": ["hi"] * 1000}, "1000 prompts"),
        ("/v1/completions", {"prompt": [[1], "hi"]}, "prompt"),
        ("/v1/completions", {"prompt": [-1]}, "-1"),
        ("/v1/completions", {"prompt": [259]}, "259"),
        ("/v1/chat/completions", {"messages": [*USER] * 10_000}, "Given: "),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": None}]}, "content"),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "image_url",
        ),
        ("/generate", {"inputs": "hi", "parameters": {"adapter_id": 5}}, "adapter_id"),
        ("/generate", {"inputs": "hi", "parameters": {"adapter_id": ["pirate"]}}, "adapter_id"),
        ("/generate", {"inputs": "hi", "parameters": {"adapter_id": "x" * 10_000}}, "adapter_id"),
        ("/generate", {"inputs": "hi", "parameters": {"adapter_id": "../../etc/passwd"}}, "adapter_id"),
        ("/generate", {"inputs": ["hi"]}, "inputs"),
        ("/generate", {"inputs": ""}, "`inputs` cannot be empty"),
        ("/generate", {"parameters": {}}, "inputs"),
        ("/detokenize", {"tokens": [259]}, "259"),
        ("/detokenize", {"tokens": [-1]}, "-1"),
    ],
)
def test_what_would_cost_too_much_or_means_nothing_is_refused_at_once(path: str, body: Any, words: str) -> None:
    async def test(server: TestServer) -> None:
        await refused(server, path, body, words)

    with_server(test, payload_limit=5_000_000)


def test_stream_options_without_a_stream_change_nothing_and_two_answers_have_one_usage_chunk() -> None:
    async def test(server: TestServer) -> None:
        options = {"stream_options": {"include_usage": True}}
        answer = await server.http.post("/v1/chat/completions", json={"messages": USER, **options})
        assert content_of(answer) == "hello world"
        answer = await server.http.post(
            "/v1/chat/completions", json={"messages": USER, "n": 2, "stream": True, **options}
        )
        chunks = [json.loads(one.removeprefix("data: ")) for one in answer.text.split("\n\n")[:-2]]
        (counts,) = [chunk["usage"] for chunk in chunks if not chunk["choices"]]
        assert (counts["prompt_tokens"], counts["completion_tokens"]) == (7, 24)

    with_server(test)


def test_control_characters_are_text_for_the_model_and_escaped_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)

    async def test(server: TestServer) -> None:
        assert (await server.generate(HOSTILE, stop=["\x00\ufeff"], max_new_tokens=3)).status_code == 200
        assert bytes(server.engine.requests[0].prompt_token_ids[1:]) == HOSTILE.encode()
        assert (await server.generate("hi", adapter_id=HOSTILE)).status_code in (404, 422)

    with_server(test)
    lines = [record.getMessage() for record in caplog.records if record.name.startswith("loraplex")]
    assert lines and not any(char in line for line in lines for char in HOSTILE[1::2])


@pytest.mark.parametrize("prompt", ["hi", " ", "\n\t "])
def test_an_answer_that_is_the_end_token_alone_is_an_empty_text(prompt: str) -> None:
    async def test(server: TestServer) -> None:
        answer = (await server.generate(prompt, details=True)).json()
        assert (answer["generated_text"], answer["details"]["finish_reason"]) == ("", "eos_token")
        assert [token["id"] for token in answer["details"]["tokens"]] == [EOS]
        stream = await server.generate(prompt, "/generate_stream")
        assert json.loads(stream.text.split("data: ")[-1])["generated_text"] == ""
        chat = await server.http.post("/v1/chat/completions", json={"messages": USER})
        assert content_of(chat) == ""

    with_server(test, engine=ScriptedEngine(token_ids=[EOS]))


def test_going_on_after_the_end_token_gives_exactly_the_tokens_that_were_asked_for() -> None:
    async def test(server: TestServer) -> None:
        answer = await server.generate("hi", ignore_eos_token=True, max_new_tokens=9, details=True)
        details = answer.json()["details"]
        assert (details["finish_reason"], details["generated_tokens"]) == ("length", 9)

    with_server(test, engine=ScriptedEngine(token_ids=[97, EOS] * 10))


def test_a_streams_headers_let_it_through_proxies() -> None:
    async def test(server: TestServer) -> None:
        native = await server.generate("hi", "/generate_stream")
        chat = await server.http.post("/v1/chat/completions", json={"messages": USER, "stream": True})
        for answer in (native, chat):
            assert answer.headers["content-type"] == "text/event-stream"
            assert answer.headers["cache-control"] == "no-cache"
            assert answer.headers["x-accel-buffering"] == "no"

    with_server(test)


def test_an_unknown_model_is_404_on_the_tokenizer_too() -> None:
    async def test(server: TestServer) -> None:
        for path, body in (("/tokenize", {"prompt": "x"}), ("/detokenize", {"tokens": [1]})):
            assert (await server.http.post(path, json=body | {"model": "nobody"})).status_code == 404

    with_server(test)
