"""Answers of /v1/responses: the items of an output, and the answer that its events carry while it grows."""

import time
from typing import Any, Literal

import msgspec

from loraplex_server.api.schemas.openai_answers import ChatLogprob
from loraplex_server.api.schemas.responses import ResponsesBody
from loraplex_server.text.tools import Tool

ItemStatus = Literal["in_progress", "completed", "incomplete"]


class OutputText(msgspec.Struct, frozen=True, tag="output_text"):
    """What the model said."""

    text: str
    annotations: list[str] = []
    logprobs: list[ChatLogprob] = []


class OutputMessage(msgspec.Struct, frozen=True, tag="message"):
    """An item of an output: what the model said."""

    id: str
    status: ItemStatus
    content: list[OutputText]
    role: str = "assistant"


class OutputCall(msgspec.Struct, frozen=True, tag="function_call"):
    """An item of an output: a function that the client is asked to call, its arguments as JSON text."""

    id: str
    call_id: str
    name: str
    arguments: str
    status: ItemStatus


class ReasoningText(msgspec.Struct, frozen=True, tag="reasoning_text"):
    """What the model thought."""

    text: str


class OutputReasoning(msgspec.Struct, frozen=True, tag="reasoning"):
    """An item of an output: what the model thought before it spoke."""

    id: str
    status: ItemStatus
    content: list[ReasoningText]
    summary: list[str] = []


OutputItem = OutputMessage | OutputCall | OutputReasoning


class InputDetails(msgspec.Struct, frozen=True):
    """More about the input."""

    cached_tokens: int
    cache_write_tokens: int = 0


class OutputDetails(msgspec.Struct, frozen=True):
    """More about the output."""

    reasoning_tokens: int


class ResponsesUsage(msgspec.Struct, frozen=True):
    """The tokens counted."""

    input_tokens: int
    input_tokens_details: InputDetails
    output_tokens: int
    output_tokens_details: OutputDetails
    total_tokens: int


class IncompleteDetails(msgspec.Struct, frozen=True):
    """Why an answer is not complete."""

    reason: str = "max_output_tokens"


class ResponseError(msgspec.Struct, frozen=True):
    """Why there is no answer."""

    code: str
    message: str


class TextFormat(msgspec.Struct, frozen=True):
    """The form that was asked for."""

    format: dict[str, Any]


class ResponsesAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """The answer of /v1/responses, and what its events carry while it grows."""

    id: str
    object: str = "response"
    created_at: int = msgspec.field(default_factory=lambda: int(time.time()))
    status: Literal["in_progress", "completed", "incomplete", "failed"] = "in_progress"
    model: str
    output: list[OutputItem] = []
    error: ResponseError | None = None
    incomplete_details: IncompleteDetails | None = None
    instructions: str | None
    max_output_tokens: int | None
    top_logprobs: int
    temperature: float
    top_p: float
    text: TextFormat
    tool_choice: str | dict[str, Any]
    tools: list[dict[str, Any]]
    parallel_tool_calls: bool
    previous_response_id: str | None = None
    store: bool = False
    truncation: str = "disabled"
    metadata: dict[str, str]
    user: str | None
    usage: ResponsesUsage | None = None


def begun_answer(body: ResponsesBody, answer_id: str, model: str) -> ResponsesAnswer:
    """The answer before the model has said anything."""
    asked = body.text.format if body.text is not None else None
    return ResponsesAnswer(
        id=answer_id,
        model=model,
        instructions=body.instructions,
        max_output_tokens=body.max_output_tokens,
        top_logprobs=body.top_logprobs or 0,
        temperature=1.0 if body.temperature is None else body.temperature,
        top_p=1.0 if body.top_p is None else body.top_p,
        text=TextFormat(asked or {"type": "text"}),
        tool_choice=body.tool_choice or "auto",
        tools=[_shown_tool(tool) for tool in body.functions()],
        parallel_tool_calls=body.parallel_tool_calls is not False,
        metadata=body.metadata or {},
        user=body.user,
    )


def _shown_tool(tool: Tool) -> dict[str, Any]:
    return {
        "type": "function",
        "name": tool.name,
        "description": tool.description,
        "parameters": tool.parameters,
        "strict": tool.is_strict,
    }


def usage_of(
    num_input_tokens: int, num_cached_tokens: int, num_output_tokens: int, num_reasoning_tokens: int
) -> ResponsesUsage:
    """The counts with their sum."""
    return ResponsesUsage(
        num_input_tokens,
        InputDetails(num_cached_tokens),
        num_output_tokens,
        OutputDetails(num_reasoning_tokens),
        num_input_tokens + num_output_tokens,
    )
