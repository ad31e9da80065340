"""Bodies of /v1/responses, text alone: the request → ChatBody, and the answer with its events."""

import time
from typing import Any, Literal

import msgspec
from pydantic import BaseModel, ConfigDict, Field, StrictInt, StrictStr

from loraplex_server.api.schemas.openai import ChatBody, ChatMessage
from loraplex_server.api.schemas.openai_answers import ChatLogprob
from loraplex_server.api.schemas.tgi import Float32, UInt32
from loraplex_server.errors import InvalidRequest

TEXT_PARTS = ("input_text", "output_text", "text")
_NO_STORE = "answers are not stored; send the whole conversation as `input`"
# Field → why it is refused; what is not listed here and not a field changes nothing in an answer.
_NOT_SERVED = {
    "previous_response_id": _NO_STORE,
    "conversation": _NO_STORE,
    "background": "send the request without it and wait, or stream",
    "prompt": "prompts are not stored; send `instructions` and `input`",
    "tools": "tools are served by /v1/chat/completions",
}
LOGPROBS = "message.output_text.logprobs"
# What else an answer may be asked to include: of things that are not in these answers.
_EMPTY_INCLUDES = (
    "reasoning.encrypted_content", "message.input_image.image_url", "file_search_call.results",
    "web_search_call.results", "web_search_call.action.sources", "code_interpreter_call.outputs",
    "computer_call_output.output.image_url",
)  # fmt: skip


class _Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)


def _chat_message(role: str, text: str) -> ChatMessage:
    return ChatMessage.model_validate({"role": role, "content": text})


class InputMessage(_Body):
    """One item of the input: a message."""

    type: str | None = Field(None, description="message, or absent")
    role: str | None = Field(None, description="user, assistant, system or developer", examples=["user"])
    content: StrictStr | list[dict[str, Any]] | None = Field(None, description="a text, or parts of type input_text")

    def as_chat(self) -> ChatMessage:
        """The same as a chat's message."""
        if self.type not in (None, "message"):
            raise InvalidRequest(f"`input` items must be of type message. Given: {self.type[:40]!r}")
        if self.role not in ("user", "assistant", "system", "developer"):
            raise InvalidRequest("`input` messages must have a `role`: user, assistant, system or developer")
        if self.content is None:
            raise InvalidRequest("`input` messages must have `content`")
        return _chat_message(self.role, self._text(self.content))

    @staticmethod
    def _text(content: str | list[dict[str, Any]]) -> str:
        if isinstance(content, str):
            return content
        texts: list[str] = []
        for part in content:
            text = part.get("text")
            if part.get("type") not in TEXT_PARTS or not isinstance(text, str):
                kind = str(part.get("type"))[:40]
                raise InvalidRequest(f"parts of a message must be of type input_text; this model reads no {kind!r}")
            texts.append(text)
        return "".join(texts)


class TextOptions(_Body):
    """How the text is to look."""

    format: dict[str, Any] | None = Field(None, description="text, json_object, or json_schema with name and schema")


class ResponsesBody(_Body):
    """The body of /v1/responses. Every field may be null, which is the same as leaving it out."""

    model: str | None = Field(None, description="the base model, an adapter, or base:adapter", examples=["pirate"])
    input: StrictStr | list[InputMessage] = Field(
        description="a text, or the messages so far", examples=["Where is the treasure?"]
    )
    instructions: str | None = Field(None, description="a system message in front of the input")
    max_output_tokens: UInt32 | None = Field(None, description="most tokens to generate", examples=[64])
    temperature: Float32 | None = Field(None, description=">= 0; 0 takes the most likely tokens; 1 when absent")
    top_p: Float32 | None = Field(None, description="> 0 and <= 1; draw among the most likely tokens of this mass")
    stream: bool | None = Field(None, description="answer with server-sent events")
    text: TextOptions | None = None
    tools: list[Any] | None = Field(None, description="not served here; see /v1/chat/completions")
    tool_choice: Any = Field(None, description="none or auto")
    parallel_tool_calls: bool | None = Field(None, description="returned as it is")
    metadata: dict[str, str] | None = Field(None, description="returned as it is")
    store: bool | None = Field(None, description="nothing is stored, whatever this says")
    user: str | None = Field(None, description="returned as it is")
    seed: StrictInt | None = Field(None, ge=-(2**63), le=2**64 - 1, description="makes the draw repeatable")
    adapter_id: str | None = Field(None, description="LoRA adapter to answer with, when `model` is the base")
    previous_response_id: str | None = Field(None, description="refused: answers are not stored")
    conversation: Any = Field(None, description="refused: conversations are not stored")
    background: bool | None = Field(None, description="refused when true")
    prompt: Any = Field(None, description="refused: prompts are not stored")
    include: list[str] | None = Field(
        None, description="what else to answer with", examples=[["message.output_text.logprobs"]]
    )
    top_logprobs: UInt32 | None = Field(None, description="0 to 20 likely tokens to report beside each generated one")

    @property
    def wants_logprobs(self) -> bool:
        """Whether the text comes with its tokens and their log-probabilities."""
        return LOGPROBS in (self.include or ()) or bool(self.top_logprobs)

    def as_chat(self) -> ChatBody:
        """The same as a chat; refuses what a chat has no word for."""
        for name, reason in _NOT_SERVED.items():
            if getattr(self, name):
                raise InvalidRequest(f"`{name}` is not supported: {reason}")
        if self.tool_choice not in (None, "none", "auto"):
            raise InvalidRequest("`tool_choice` is not supported: tools are served by /v1/chat/completions")
        for asked in self.include or ():
            if asked != LOGPROBS and asked not in _EMPTY_INCLUDES:
                raise InvalidRequest(f"`include` has {asked[:60]!r}, which is not known; {LOGPROBS} is")
        if not self.input:
            raise InvalidRequest("`input` must not be empty")
        if self.max_output_tokens == 0:
            raise InvalidRequest("`max_output_tokens` must be >= 1")
        messages = [_chat_message("system", self.instructions)] if self.instructions else []
        if isinstance(self.input, str):
            messages.append(_chat_message("user", self.input))
        else:
            messages += [item.as_chat() for item in self.input]
        return ChatBody.model_validate(
            {
                "model": self.model,
                "adapter_id": self.adapter_id,
                "messages": messages,
                "max_tokens": self.max_output_tokens,
                "temperature": self.temperature,
                "top_p": self.top_p,
                "stream": self.stream,
                "seed": self.seed,
                "user": self.user,
                "add_generation_prompt": True,
                "response_format": self._response_format(),
                "logprobs": self.wants_logprobs,
                "top_logprobs": self.top_logprobs or 0,
            }
        )

    def _response_format(self) -> dict[str, Any] | None:
        asked = self.text.format if self.text is not None else None
        if asked is None or asked.get("type") != "json_schema":
            return asked
        return {"type": "json_schema", "json_schema": {key: value for key, value in asked.items() if key != "type"}}


class OutputText(msgspec.Struct, frozen=True, tag="output_text"):
    """What the model said."""

    text: str
    annotations: list[str] = []
    logprobs: list[ChatLogprob] = []


class OutputMessage(msgspec.Struct, frozen=True, tag="message"):
    """The one item of an output."""

    id: str
    status: Literal["in_progress", "completed", "incomplete"]
    content: list[OutputText]
    role: str = "assistant"


class InputDetails(msgspec.Struct, frozen=True):
    """More about the input."""

    cached_tokens: int
    cache_write_tokens: int = 0


class OutputDetails(msgspec.Struct, frozen=True):
    """More about the output."""

    reasoning_tokens: int = 0


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
    output: list[OutputMessage] = []
    error: ResponseError | None = None
    incomplete_details: IncompleteDetails | None = None
    instructions: str | None
    max_output_tokens: int | None
    top_logprobs: int
    temperature: float
    top_p: float
    text: TextFormat
    tool_choice: str
    tools: list[str] = []
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
        parallel_tool_calls=body.parallel_tool_calls is not False,
        metadata=body.metadata or {},
        user=body.user,
    )


def usage_of(num_input_tokens: int, num_cached_tokens: int, num_output_tokens: int) -> ResponsesUsage:
    """The counts with their sum."""
    return ResponsesUsage(
        num_input_tokens,
        InputDetails(num_cached_tokens),
        num_output_tokens,
        OutputDetails(),
        num_input_tokens + num_output_tokens,
    )
