"""Rows of langchain-huggingface and langchain-openai."""

from langchain_core.messages import HumanMessage, ToolMessage
from langchain_huggingface import ChatHuggingFace, HuggingFaceEndpoint
from langchain_openai import ChatOpenAI, OpenAI
from pydantic import BaseModel, Field
from rows import PIRATE, PROMPT, QUESTION, WEATHER, is_weather_call, main, row


class City(BaseModel):
    """A city."""

    city: str = Field(max_length=12)


def openai_chat(url: str) -> ChatOpenAI:
    return ChatOpenAI(base_url=f"{url}/v1", api_key="none", model="pirate", max_tokens=24, temperature=0)


@row
def openai_chat_invoke(url: str) -> None:
    assert openai_chat(url).invoke(QUESTION).content.startswith(PIRATE)


@row
def openai_chat_stream(url: str) -> None:
    assert "".join(chunk.content for chunk in openai_chat(url).stream(QUESTION)).startswith(PIRATE)


@row
def openai_chat_structured_output(url: str) -> None:
    model = ChatOpenAI(base_url=f"{url}/v1", api_key="none", model="tgi", max_tokens=60, temperature=0)
    assert isinstance(model.with_structured_output(City).invoke(QUESTION), City)


@row
def openai_responses_with_a_tool(url: str) -> None:
    model = ChatOpenAI(
        base_url=f"{url}/v1", api_key="none", model="tgi", max_tokens=60, temperature=0, use_responses_api=True
    )
    first = model.bind_tools([WEATHER], tool_choice="required", parallel_tool_calls=False).invoke(QUESTION)
    (call,) = first.tool_calls
    is_weather_call(call["name"], call["args"])
    gave = ToolMessage("sunny", tool_call_id=call["id"])
    assert model.invoke([HumanMessage(QUESTION), first, gave]).text


@row
def openai_completions(url: str) -> None:
    model = OpenAI(base_url=f"{url}/v1", api_key="none", model="pirate", max_tokens=24, temperature=0)
    assert model.invoke(PROMPT).startswith(PIRATE)
    assert "".join(model.stream(PROMPT)).startswith(PIRATE)


def endpoint(url: str) -> HuggingFaceEndpoint:
    return HuggingFaceEndpoint(
        endpoint_url=url, huggingfacehub_api_token="none", max_new_tokens=24, do_sample=False,
        model_kwargs={"adapter_id": "pirate"},
    )  # fmt: skip


@row
def huggingface_endpoint_invoke(url: str) -> None:
    assert PIRATE in endpoint(url).invoke(PROMPT)


@row
def huggingface_endpoint_stream(url: str) -> None:
    assert PIRATE in "".join(endpoint(url).stream(PROMPT))


@row
def huggingface_chat(url: str) -> None:
    # What the endpoint has for text_generation alone, adapter_id, the client's chat does not take.
    plain = HuggingFaceEndpoint(endpoint_url=url, huggingfacehub_api_token="none", max_new_tokens=24, do_sample=False)
    chat = ChatHuggingFace(llm=plain, model_id="HuggingFaceTB/SmolLM2-135M-Instruct", max_tokens=24)
    assert chat.invoke(QUESTION).content
    assert "".join(chunk.content for chunk in chat.stream(QUESTION))


main()
