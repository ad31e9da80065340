"""`huggingface_hub`'s released clients against the real server on loopback."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from huggingface_hub import AsyncInferenceClient, InferenceClient
from huggingface_hub.errors import (
    GenerationError,
    HfHubHTTPError,
    IncompleteGenerationError,
    OverloadedError,
    TextGenerationError,
    ValidationError,
)
from scripted_engine import DEADLINE_S, ScriptedEngine, TestServer, api_server


def with_client(use: Callable[[InferenceClient], None], **options: Any) -> None:
    """Run `use` in a thread, as a blocking client is used, against a live server."""

    async def run() -> None:
        async with asyncio.timeout(DEADLINE_S), api_server(live=True, **options) as server:
            with InferenceClient(server.base_url) as client:
                await asyncio.to_thread(use, client)

    asyncio.run(run())


def test_plain_text() -> None:
    with_client(lambda client: _equal(client.text_generation("hi", return_full_text=False), "hello world"))


def test_the_prompt_is_in_front_unless_the_client_objects() -> None:
    with_client(lambda client: _equal(client.text_generation("hi"), "hihello world"))


def _equal(found: object, expected: object) -> None:
    assert found == expected


def test_an_adapter() -> None:
    with_client(lambda client: _equal(client.text_generation("hi", adapter_id="pirate", return_full_text=False), "arr"))


def test_details() -> None:
    def use(client: InferenceClient) -> None:
        answer = client.text_generation(
            "hi", details=True, max_new_tokens=5, top_n_tokens=2, decoder_input_details=True
        )
        assert answer.generated_text == "hihello"
        assert (answer.details.finish_reason, answer.details.generated_tokens) == ("length", 5)
        assert [token.text for token in answer.details.tokens] == list("hello")
        assert len(answer.details.top_tokens) == 5
        assert [token.logprob for token in answer.details.prefill] == [None, -1.0, -1.0]

    with_client(use, prefill_logprobs=True)


def test_best_of() -> None:
    def use(client: InferenceClient) -> None:
        answer = client.text_generation("hi", details=True, best_of=2, do_sample=True)
        assert len(answer.details.best_of_sequences) == 1

    with_client(use)


def test_a_stream_of_texts() -> None:
    with_client(
        lambda client: _equal("".join(client.text_generation("hi", stream=True, adapter_id="pirate")), "arr</s>")
    )


def test_a_stream_with_details() -> None:
    def use(client: InferenceClient) -> None:
        chunks = list(client.text_generation("hi", stream=True, details=True, return_full_text=False))
        assert "".join(chunk.token.text for chunk in chunks if not chunk.token.special) == "hello world"
        assert [chunk.index for chunk in chunks] == list(range(1, 13))
        last = chunks[-1]
        assert (last.generated_text, last.details.finish_reason) == ("hello world", "eos_token")
        assert (last.details.input_length, last.details.generated_tokens) == (3, 12)

    with_client(use)


def test_every_parameter_at_once() -> None:
    def use(client: InferenceClient) -> None:
        text = client.text_generation(
            "hi", adapter_id="json", do_sample=True, frequency_penalty=0.1, max_new_tokens=9, repetition_penalty=1.1,
            return_full_text=False, seed=3, stop=["}"], temperature=0.9, top_k=5, top_p=0.9, truncate=2,
            typical_p=0.9, watermark=True,
        )  # fmt: skip
        assert text == '{"a": 1}'

    with_client(use)


@pytest.mark.parametrize(
    ("engine", "settings", "parameters", "expected"),
    [
        ({}, {}, {"temperature": -1.0}, ValidationError),
        ({"fail_at": 2}, {}, {}, GenerationError),
        ({}, {"max_concurrent_requests": 1}, {"best_of": 2, "do_sample": True}, OverloadedError),
        ({"cancel_at": 2}, {}, {}, IncompleteGenerationError),
    ],
)
def test_the_four_error_types(
    engine: dict[str, int], settings: dict[str, int], parameters: dict[str, Any], expected: type[Exception]
) -> None:
    def use(client: InferenceClient) -> None:
        with pytest.raises(expected):
            client.text_generation("hi", **parameters)

    with_client(use, engine=ScriptedEngine(**engine), **settings)


@pytest.mark.parametrize(
    ("engine", "parameters", "expected", "words"),
    [
        ({}, {"temperature": -1.0}, ValidationError, "strictly positive"),
        ({}, {"adapter_id": "none"}, TextGenerationError, "not known to this server"),
        ({"fail_at": 2}, {}, GenerationError, "boom"),
    ],
)
def test_an_error_inside_a_stream_is_typed_too(
    engine: dict[str, int], parameters: dict[str, Any], expected: type[Exception], words: str
) -> None:
    def use(client: InferenceClient) -> None:
        with pytest.raises(expected, match=words):
            list(client.text_generation("hi", stream=True, **parameters))

    with_client(use, engine=ScriptedEngine(**engine))


def test_an_unknown_adapter_is_an_error_with_its_text() -> None:
    def use(client: InferenceClient) -> None:
        with pytest.raises((TextGenerationError, HfHubHTTPError), match="not known to this server"):
            client.text_generation("hi", adapter_id="none")

    with_client(use)


def test_info_and_health() -> None:
    def use(client: InferenceClient) -> None:
        assert client.get_endpoint_info()["model_id"] == "tiny-base"
        assert client.health_check()

    async def run() -> None:
        async with asyncio.timeout(DEADLINE_S), api_server(live=True) as server:
            with InferenceClient(server.base_url, provider="hf-inference") as client:
                await asyncio.to_thread(use, client)

    asyncio.run(run())


def test_the_async_client() -> None:
    async def use(server: TestServer) -> None:
        async with AsyncInferenceClient(server.base_url) as client:
            assert await client.text_generation("hi", return_full_text=False) == "hello world"
            stream = await client.text_generation("hi", stream=True, details=True)
            assert [chunk async for chunk in stream][-1].generated_text == "hihello world"

    async def run() -> None:
        async with asyncio.timeout(DEADLINE_S), api_server(live=True) as server:
            await use(server)

    asyncio.run(run())
