"""Rows of the openai package."""

from typing import Literal

import openai
import pydantic
from rows import ASK, PIRATE, PROMPT, SCHEMA, WEATHER, is_answer, is_weather_call, main, raises, row

CHAT = {"model": "pirate", "messages": ASK, "max_tokens": 24, "temperature": 0}

FLAT_WEATHER = {"type": "function", **WEATHER["function"]}


class Weather(pydantic.BaseModel):
    """The weather of a city."""

    city: Literal["Paris", "Rome"]


def client_of(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


@row
def chat(url: str) -> None:
    with client_of(url) as client:
        answer = client.chat.completions.create(**CHAT)
    assert answer.choices[0].message.content.startswith(PIRATE) and answer.model == "pirate"


@row
def chat_stream_with_usage(url: str) -> None:
    with client_of(url) as client:
        chunks = list(client.chat.completions.create(**CHAT, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text.startswith(PIRATE) and chunks[-1].usage.completion_tokens > 0 and not chunks[-1].choices


@row
def chat_n_and_logprobs(url: str) -> None:
    with client_of(url) as client:
        answer = client.chat.completions.create(
            model="shout", messages=ASK, max_tokens=8, n=2, seed=3, logprobs=True, top_logprobs=3
        )
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert all(len(choice.logprobs.content[0].top_logprobs) == 3 for choice in answer.choices)


@row
def chat_tools_required(url: str) -> None:
    with client_of(url) as client:
        answer = client.chat.completions.create(
            model="tgi", messages=ASK, max_tokens=60, temperature=0, tools=[WEATHER], tool_choice="required"
        )
    (call,) = answer.choices[0].message.tool_calls
    is_weather_call(call.function.name, call.function.arguments)
    assert answer.choices[0].finish_reason == "tool_calls"


@row
def chat_tools_streamed(url: str) -> None:
    named = {"type": "function", "function": {"name": "get_weather"}}
    with client_of(url) as client:
        chunks = client.chat.completions.create(
            model="tgi", messages=ASK, max_tokens=60, temperature=0, tools=[WEATHER], tool_choice=named, stream=True
        )
        calls = [call for chunk in chunks if chunk.choices for call in chunk.choices[0].delta.tool_calls or ()]
    names = [call.function.name for call in calls if call.function.name]
    assert len(names) == 1 and calls[0].id
    is_weather_call(names[0], "".join(call.function.arguments or "" for call in calls))


@row
def chat_json_schema(url: str) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "city", "schema": SCHEMA, "strict": True}}
    with client_of(url) as client:
        answer = client.chat.completions.create(
            model="tgi", messages=ASK, max_tokens=60, temperature=0, response_format=form
        )
    is_answer(answer.choices[0].message.content)


@row
def completions_of_several_prompts(url: str) -> None:
    with client_of(url) as client:
        answer = client.completions.create(model="pirate", prompt=[PROMPT, "The sea"], max_tokens=20, temperature=0)
        pieces = ["", ""]
        for chunk in client.completions.create(
            model="pirate", prompt=[PROMPT, "The sea"], max_tokens=20, temperature=0, stream=True
        ):
            pieces[chunk.choices[0].index] += chunk.choices[0].text
    assert pieces == [choice.text for choice in answer.choices] and pieces[0].startswith(PIRATE)


@row
def completions_echo_with_logprobs(url: str) -> None:
    with client_of(url) as client:
        answer = client.completions.create(
            model="tgi", prompt=[504, 3575, 282], max_tokens=1, echo=True, logprobs=1, temperature=0
        )
    found = answer.choices[0].logprobs
    assert len(found.tokens) == 4 and found.token_logprobs[0] is None
    assert all(top[token] == value for top, token, value in
               zip(found.top_logprobs[1:], found.tokens[1:], found.token_logprobs[1:], strict=True))  # fmt: skip


@row
def models_list_and_retrieve(url: str) -> None:
    with client_of(url) as client:
        names = [model.id for model in client.models.list()]
        assert "/" in names[0] and {"pirate", "json", "shout"} <= set(names)
        assert [client.models.retrieve(name).id for name in names] == names


@row
def responses(url: str) -> None:
    with client_of(url) as client:
        answer = client.responses.create(model="pirate", input=ASK[0]["content"], max_output_tokens=24, temperature=0)
    assert answer.output_text.startswith(PIRATE) and answer.usage.output_tokens > 0
    assert answer.status in ("completed", "incomplete")


@row
def responses_stream(url: str) -> None:
    with (
        client_of(url) as client,
        client.responses.stream(
            model="pirate", instructions="Answer briefly.", input=ASK, max_output_tokens=24, temperature=0
        ) as stream,
    ):
        kinds, text = [], ""
        for event in stream:
            kinds.append(event.type)
            text += event.delta if event.type == "response.output_text.delta" else ""
        final = stream.get_final_response()
    assert kinds[0] == "response.created" and kinds[-1] in ("response.completed", "response.incomplete")
    assert final.output_text == text and "Yo" in text


@row
def responses_tools_and_what_they_gave(url: str) -> None:
    asked = {"model": "tgi", "tools": [FLAT_WEATHER], "max_output_tokens": 60, "temperature": 0}
    with client_of(url) as client:
        first = client.responses.create(**asked, input=ASK, tool_choice="required", parallel_tool_calls=False)
        (call,) = first.output
        is_weather_call(call.name, call.arguments)
        gave = {"type": "function_call_output", "call_id": call.call_id, "output": "sunny, 21 degrees"}
        second = client.responses.create(**asked, input=[*ASK, *first.output, gave], tool_choice="none")
    assert first.status == "completed" and second.output_text


@row
def responses_tools_streamed(url: str) -> None:
    with (
        client_of(url) as client,
        client.responses.stream(
            model="tgi", input=ASK, tools=[openai.pydantic_function_tool(Weather, name="get_weather")],
            tool_choice={"type": "function", "name": "get_weather"}, max_output_tokens=60, temperature=0,
        ) as stream,
    ):  # fmt: skip
        pieces = [event.delta for event in stream if event.type == "response.function_call_arguments.delta"]
        (call,) = stream.get_final_response().output
    assert "".join(pieces) == call.arguments and call.parsed_arguments.city in ("Paris", "Rome")


@row
def errors_show_their_text(url: str) -> None:
    with client_of(url) as client:
        text = raises(openai.NotFoundError, lambda: client.chat.completions.create(model="pirat", messages=ASK))
        assert "'pirat' is not known" in text
        text = raises(
            openai.UnprocessableEntityError,
            lambda: client.chat.completions.create(model="tgi", messages=ASK, top_p=3),
        )
        assert "top_p" in text
        raises(openai.NotFoundError, lambda: list(client.completions.create(model="nobody", prompt="x", stream=True)))
        raises(openai.APIStatusError, lambda: client.embeddings.create(model="tgi", input="x"))


@row
async def asynchronous(url: str) -> None:
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        stream = await client.chat.completions.create(**CHAT, stream=True)
        text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
    assert text.startswith(PIRATE)


main()
