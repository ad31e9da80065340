"""Rows of huggingface_hub's InferenceClient, sync and async."""

import json

from huggingface_hub import AsyncInferenceClient, InferenceClient
from huggingface_hub.errors import GenerationError, OverloadedError, TextGenerationError, ValidationError
from rows import ASK, PIRATE, PROMPT, SCHEMA, WEATHER, is_answer, is_weather_call, main, raises, row

GREEDY = {"adapter_id": "pirate", "max_new_tokens": 24, "return_full_text": False}
CHAT = {"model": "pirate", "messages": ASK, "max_tokens": 24, "temperature": 0.0}


@row
def text_generation_plain(url: str) -> None:
    with InferenceClient(url) as client:
        assert client.text_generation(PROMPT, **GREEDY).startswith(PIRATE)


@row
def text_generation_details(url: str) -> None:
    with InferenceClient(url) as client:
        answer = client.text_generation(PROMPT, **GREEDY, details=True)
    assert answer.details.generated_tokens == len(answer.details.tokens)
    assert answer.generated_text.startswith(PIRATE)


@row
def text_generation_stream(url: str) -> None:
    with InferenceClient(url) as client:
        assert "".join(client.text_generation(PROMPT, **GREEDY, stream=True)).startswith(PIRATE)


@row
def text_generation_stream_details(url: str) -> None:
    with InferenceClient(url) as client:
        chunks = list(client.text_generation(PROMPT, **GREEDY, stream=True, details=True))
    assert chunks[-1].details.generated_tokens == len(chunks)
    assert chunks[-1].generated_text.startswith(PIRATE)


@row
def text_generation_grammar(url: str) -> None:
    with InferenceClient(url) as client:
        is_answer(
            client.text_generation(
                PROMPT, max_new_tokens=60, return_full_text=False, grammar={"type": "json", "value": SCHEMA}
            )
        )
        digits = client.text_generation(
            PROMPT, max_new_tokens=20, return_full_text=False, grammar={"type": "regex", "value": "[0-9]{3}"}
        )
    assert len(digits) == 3 and digits.isdigit(), digits


@row
def text_generation_best_of(url: str) -> None:
    with InferenceClient(url) as client:
        answer = client.text_generation(PROMPT, **GREEDY, best_of=2, do_sample=True, details=True)
    assert len(answer.details.best_of_sequences) == 1


@row
def text_generation_decoder_input_details(url: str) -> None:
    with InferenceClient(url) as client:
        client.text_generation(PROMPT, **GREEDY, details=True, decoder_input_details=True)


@row
def text_generation_typed_errors(url: str) -> None:
    with InferenceClient(url) as client:
        assert "temperature" in raises(
            ValidationError, lambda: client.text_generation(PROMPT, **GREEDY, temperature=-1.0)
        )
        assert "nobody" in raises(
            TextGenerationError, lambda: list(client.text_generation(PROMPT, adapter_id="nobody", stream=True))
        )
    assert issubclass(OverloadedError, TextGenerationError) and issubclass(GenerationError, TextGenerationError)


@row
async def async_text_generation(url: str) -> None:
    async with AsyncInferenceClient(url) as client:
        whole = await client.text_generation(PROMPT, **GREEDY)
        pieces = [piece async for piece in await client.text_generation(PROMPT, **GREEDY, stream=True)]
    assert whole.startswith(PIRATE) and "".join(pieces).startswith(whole)


@row
def chat_plain(url: str) -> None:
    with InferenceClient(base_url=url) as client:
        assert client.chat_completion(**CHAT).choices[0].message.content.startswith(PIRATE)


@row
def chat_stream_with_usage(url: str) -> None:
    with InferenceClient(base_url=url) as client:
        chunks = list(client.chat_completion(**CHAT, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text.startswith(PIRATE) and chunks[-1].usage.completion_tokens > 0


@row
def chat_logprobs(url: str) -> None:
    with InferenceClient(base_url=url) as client:
        answer = client.chat_completion(**CHAT, logprobs=True, top_logprobs=2)
    assert len(answer.choices[0].logprobs.content[0].top_logprobs) == 2


@row
def chat_tools(url: str) -> None:
    with InferenceClient(base_url=url) as client:
        answer = client.chat_completion(
            ASK, model="tgi", max_tokens=60, temperature=0.0, tools=[WEATHER], tool_choice="required"
        )
    (call,) = answer.choices[0].message.tool_calls
    is_weather_call(call.function.name, call.function.arguments)


@row
def chat_response_format_json_schema(url: str) -> None:
    with InferenceClient(base_url=url) as client:
        answer = client.chat_completion(
            ASK, model="tgi", max_tokens=60, temperature=0.0,
            response_format={"type": "json_schema", "json_schema": {"name": "city", "schema": SCHEMA}},
        )  # fmt: skip
    is_answer(answer.choices[0].message.content)


@row
def chat_response_format_json_value(url: str) -> None:
    with InferenceClient(base_url=url) as client:
        answer = client.chat_completion(
            ASK, model="tgi", max_tokens=60, temperature=0.0, response_format={"type": "json", "value": SCHEMA}
        )
    is_answer(answer.choices[0].message.content)


@row
def chat_response_format_json_object(url: str) -> None:
    with InferenceClient(base_url=url) as client:
        answer = client.chat_completion(
            ASK, model="json", max_tokens=60, temperature=0.0, response_format={"type": "json_object"}
        )
    assert isinstance(json.loads(answer.choices[0].message.content), dict)


@row
def chat_extra_body_names_the_adapter(url: str) -> None:
    with InferenceClient(url) as client:
        answer = client.chat_completion(ASK, max_tokens=24, temperature=0.0, extra_body={"adapter_id": "pirate"})
    assert answer.choices[0].message.content.startswith(PIRATE)


@row
async def async_chat(url: str) -> None:
    async with AsyncInferenceClient(base_url=url) as client:
        whole = (await client.chat_completion(**CHAT)).choices[0].message.content
        stream = await client.chat_completion(**CHAT, stream=True)
        text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
    assert text == whole and whole.startswith(PIRATE)


@row
def endpoint_info_and_health(url: str) -> None:
    with InferenceClient(url, provider="hf-inference") as client:
        assert client.get_endpoint_info()["max_total_tokens"] > 0
        assert client.health_check() is True


main()
