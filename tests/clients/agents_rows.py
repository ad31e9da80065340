"""Rows of OpenAI's Agents SDK, which speaks to /v1/responses."""

from typing import Literal

import openai
import pydantic
from agents import Agent, ModelSettings, OpenAIResponsesModel, Runner, function_tool, set_tracing_disabled
from rows import PIRATE, QUESTION, main, row

set_tracing_disabled(True)
CITIES = ("Paris", "Rome")


class Size(pydantic.BaseModel):
    """How large a city is."""

    size: Literal["small", "large"]


@function_tool
def get_weather(city: Literal["Paris", "Rome"]) -> str:
    """The weather of a city."""
    return f"sunny in {city}"


def agent_of(client: openai.AsyncOpenAI, model: str, **fields: object) -> Agent:
    return Agent(name="demo", model=OpenAIResponsesModel(model=model, openai_client=client), **fields)


def client_of(url: str) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


@row
async def an_agent_answers_and_goes_on(url: str) -> None:
    settings = ModelSettings(max_tokens=24, temperature=0)
    async with client_of(url) as client:
        agent = agent_of(client, "pirate", model_settings=settings)
        first = await Runner.run(agent, QUESTION)
        assert first.final_output.startswith(PIRATE)
        second = await Runner.run(agent, [*first.to_input_list(), {"role": "user", "content": QUESTION}])
    assert second.final_output.startswith("Yo") and second.raw_responses[0].usage.input_tokens > 24


@row
async def an_agent_calls_its_function(url: str) -> None:
    settings = ModelSettings(max_tokens=60, temperature=0, tool_choice="required", parallel_tool_calls=False)
    async with client_of(url) as client:
        agent = agent_of(
            client, "tgi", tools=[get_weather], tool_use_behavior="stop_on_first_tool", model_settings=settings
        )
        found = await Runner.run(agent, QUESTION)
        assert found.final_output in [f"sunny in {city}" for city in CITIES]
        talker = agent_of(client, "pirate", instructions="Be brief.", model_settings=ModelSettings(max_tokens=24))
        said = await Runner.run(talker, found.to_input_list())
    assert said.final_output


@row
async def an_agent_with_functions_answers_in_a_type_of_its_own(url: str) -> None:
    settings = ModelSettings(max_tokens=60, temperature=0)
    async with client_of(url) as client:
        agent = agent_of(
            client, "tgi", tools=[get_weather], tool_use_behavior="stop_on_first_tool", model_settings=settings,
            output_type=Size,
        )  # fmt: skip
        found = await Runner.run(agent, QUESTION)
    assert isinstance(found.final_output, Size) or found.final_output in [f"sunny in {city}" for city in CITIES]


@row
async def an_agent_streams_its_call(url: str) -> None:
    settings = ModelSettings(max_tokens=60, temperature=0, tool_choice="get_weather")
    async with client_of(url) as client:
        agent = agent_of(
            client, "tgi", tools=[get_weather], tool_use_behavior="stop_on_first_tool", model_settings=settings
        )
        running = Runner.run_streamed(agent, QUESTION)
        names = [event.name async for event in running.stream_events() if event.type == "run_item_stream_event"]
    assert names == ["tool_called", "tool_output"] and running.final_output.startswith("sunny in ")


main()
