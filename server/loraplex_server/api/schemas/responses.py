"""The body of /v1/responses → ChatBody."""

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, StrictInt, StrictStr

from loraplex_server.api.schemas.merged_adapters import MergedAdapters
from loraplex_server.api.schemas.openai import ChatBody
from loraplex_server.api.schemas.responses_input import InputItem, as_messages
from loraplex_server.api.schemas.tgi import Float32, Int32, UInt32
from loraplex_server.errors import InvalidRequest
from loraplex_server.text.tool_fields import read_function
from loraplex_server.text.tools import Tool

_NO_STORE = "answers are not stored; send the whole conversation as `input`"
# Field → why it is refused; what is not listed here and not a field changes nothing in an answer.
_NOT_SERVED = {
    "previous_response_id": _NO_STORE,
    "conversation": _NO_STORE,
    "background": "send the request without it and wait, or stream",
    "prompt": "prompts are not stored; send `instructions` and `input`",
}
LOGPROBS = "message.output_text.logprobs"
# What else an answer may be asked to include: of things that are not in these answers.
_EMPTY_INCLUDES = (
    "reasoning.encrypted_content", "message.input_image.image_url", "file_search_call.results",
    "web_search_call.results", "web_search_call.action.sources", "code_interpreter_call.outputs",
    "computer_call_output.output.image_url",
)  # fmt: skip
_AS_IN_CHAT = (
    "model", "adapter_id", "lora_path", "adapter_source", "api_token", "merged_adapters", "temperature", "top_p",
    "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "stop", "min_tokens",
    "ignore_eos", "chat_template_kwargs", "stream", "seed", "user", "parallel_tool_calls",
)  # fmt: skip
_CHOICES = ("auto", "none", "required")
# What a function tool may say, and what it would need.
_TOOL_FIELDS_NOT_SERVED = {
    "defer_loading": "the model sees all tools at once",
    "async": "the model waits for what a call gives",
}


class _Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)


class TextOptions(_Body):
    """How the text is to look."""

    format: dict[str, Any] | None = Field(None, description="text, json_object, or json_schema with name and schema")


class Reasoning(_Body):
    """How much the model is to think."""

    effort: str | None = Field(None, description="for chat templates that know it; none also asks for no thinking")


class ResponsesBody(_Body):
    """The body of /v1/responses. Every field may be null, which is the same as leaving it out."""

    model: str | None = Field(None, description="the base model, an adapter, or base:adapter", examples=["pirate"])
    input: StrictStr | list[InputItem] = Field(
        description="a text, or the messages and calls so far", examples=["Where is the treasure?"]
    )
    instructions: str | None = Field(None, description="a system message in front of the input")
    max_output_tokens: UInt32 | None = Field(None, description="most tokens to generate", examples=[64])
    temperature: Float32 | None = Field(None, description=">= 0; 0 takes the most likely tokens; 1 when absent")
    top_p: Float32 | None = Field(None, description="> 0 and <= 1; draw among the most likely tokens of this mass")
    stream: bool | None = Field(None, description="answer with server-sent events")
    text: TextOptions | None = None
    tools: list[Any] | None = Field(None, description="functions that the model may ask the client to call; each "
                                    "with type function, name, description, parameters and strict")  # fmt: skip
    tool_choice: Any = Field(None, description="auto, none, required, or a function that must be called: type and name")
    parallel_tool_calls: bool | None = Field(None, description="false for one call an answer")
    metadata: dict[str, str] | None = Field(None, description="returned as it is")
    store: bool | None = Field(None, description="nothing is stored, whatever this says")
    user: str | None = Field(None, description="returned as it is")
    seed: StrictInt | None = Field(None, ge=-(2**63), le=2**64 - 1, description="makes the draw repeatable")
    adapter_id: str | None = Field(None, description="LoRA adapter to answer with, when `model` is the base")
    lora_path: str | None = Field(None, description="SGLang's name of adapter_id")
    adapter_source: str | None = Field(None, description="where an unknown adapter comes from: hub, local, s3 or pbase")
    api_token: str | None = Field(None, description="token for the adapter's source")
    merged_adapters: MergedAdapters | None = Field(None, description="several adapters to answer with as one")
    top_k: Int32 | None = Field(None, description="as in chat, and so are the fields up to `chat_template_kwargs`")
    min_p: Float32 | None = None
    repetition_penalty: Float32 | None = None
    presence_penalty: Float32 | None = None
    frequency_penalty: Float32 | None = None
    stop: StrictStr | list[StrictStr] | None = None
    min_tokens: UInt32 | None = None
    ignore_eos: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning: Reasoning | None = None
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
        for asked in self.include or ():
            if asked != LOGPROBS and asked not in _EMPTY_INCLUDES:
                raise InvalidRequest(f"`include` has {asked[:60]!r}, which is not known; {LOGPROBS} is")
        if not self.input:
            raise InvalidRequest("`input` must not be empty")
        if self.max_output_tokens == 0:
            raise InvalidRequest("`max_output_tokens` must be >= 1")
        messages = [{"role": "system", "content": self.instructions}] if self.instructions else []
        return ChatBody.model_validate(
            {name: getattr(self, name) for name in _AS_IN_CHAT}
            | {
                "messages": messages + self._messages(),
                "max_tokens": self.max_output_tokens,
                "add_generation_prompt": True,
                "response_format": self._response_format(),
                "tools": [_chat_tool(tool) for tool in self.functions()],
                "tool_choice": self._chosen_tool(),
                "reasoning_effort": self.reasoning.effort if self.reasoning is not None else None,
                "logprobs": self.wants_logprobs,
                "top_logprobs": self.top_logprobs or 0,
            }
        )

    def _messages(self) -> list[dict[str, Any]]:
        return [{"role": "user", "content": self.input}] if isinstance(self.input, str) else as_messages(self.input)

    def functions(self) -> list[Tool]:
        """The functions that may be called. Raises InvalidRequest for tools of other types, and ToolFailed."""
        return [_read_tool(f"tools[{place}]", tool) for place, tool in enumerate(self.tools or ())]

    def _chosen_tool(self) -> Any:
        if isinstance(self.tool_choice, str) and self.tool_choice not in _CHOICES:
            raise InvalidRequest(f"`tool_choice` must be {', '.join(_CHOICES)} or a function: {{type: function, name}}")
        return self.tool_choice

    def _response_format(self) -> dict[str, Any] | None:
        asked = self.text.format if self.text is not None else None
        if asked is None or asked.get("type") != "json_schema":
            return asked
        return {"type": "json_schema", "json_schema": {key: value for key, value in asked.items() if key != "type"}}


def _read_tool(where: str, tool: Any) -> Tool:
    kind = tool.get("type") if isinstance(tool, dict) else None
    if kind != "function":
        raise InvalidRequest(
            f"`{where}` is of type {str(kind)[:40]!r}, which is not served: this server runs no tools of its own; "
            "type function is, which the client runs"
        )
    for name, instead in _TOOL_FIELDS_NOT_SERVED.items():
        if tool.get(name):
            raise InvalidRequest(f"`{where}.{name}` is not supported: {instead}")
    return read_function(where, tool)


def _chat_tool(tool: Tool) -> dict[str, Any]:
    shown = tool.as_function()
    return {**shown, "function": {**shown["function"], "strict": tool.is_strict}}
