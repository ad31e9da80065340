"""The items of a Responses input → the messages of a chat."""

from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, StrictStr

from loraplex_server.errors import InvalidRequest

ROLES = ("user", "assistant", "system", "developer")
TEXT_PARTS = ("input_text", "output_text", "text", "reasoning_text", "summary_text")
ITEM_TYPES = ("message", "function_call", "function_call_output", "reasoning")

_Message = dict[str, Any]


class InputItem(BaseModel):
    """One item of the input: a message, a call of a function, what the call gave, or earlier reasoning."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)

    type: str | None = Field(None, description="message (or absent), function_call, function_call_output or reasoning")
    role: str | None = Field(None, description="of a message: user, assistant, system or developer", examples=["user"])
    content: StrictStr | list[dict[str, Any]] | None = Field(
        None, description="of a message or reasoning: a text, or parts of type input_text"
    )
    call_id: str | None = Field(None, description="names a call of a function, and links what it gave to it")
    name: str | None = Field(None, description="of a call: the function")
    arguments: StrictStr | None = Field(None, description="of a call: its arguments as JSON text")
    output: StrictStr | list[dict[str, Any]] | None = Field(None, description="what a call gave")
    summary: list[dict[str, Any]] | None = Field(None, description="of reasoning, where it has no `content`")
    encrypted_content: str | None = Field(None, description="of reasoning; cannot be read here")


def as_messages(items: Sequence[InputItem]) -> list[_Message]:
    """The same as a chat's messages; calls and reasoning belong to the assistant's message beside them.

    Raises InvalidRequest, naming the item.
    """
    messages: list[_Message] = []
    called: set[str] = set()
    reasoning = ""
    for place, item in enumerate(items):
        where = f"input[{place}]"
        match item.type:
            case None | "message":
                message = _message(where, item)
                if message["role"] == "assistant":
                    _take_over(_turn(messages, joins_text=False), message["content"], reasoning)
                    reasoning = ""
                else:
                    messages.append(message)
            case "function_call":
                called.add(_given(where, item, "call_id"))
                turn = _turn(messages, joins_text=True)
                _take_over(turn, "", reasoning)
                reasoning = ""
                turn.setdefault("tool_calls", []).append(_call(where, item))
            case "function_call_output":
                if _given(where, item, "call_id") not in called:
                    raise InvalidRequest(
                        f"`{where}` is the output of the call {str(item.call_id)[:80]!r}, which no function_call "
                        "before it makes; answers are not stored, so send the calls as well"
                    )
                output = _text(where, _given(where, item, "output"))
                messages.append({"role": "tool", "tool_call_id": item.call_id, "content": output})
            case "reasoning":
                reasoning += _reasoning(where, item)
            case other:
                raise InvalidRequest(
                    f"`{where}` is of type {other[:40]!r}, which is not served; {', '.join(ITEM_TYPES)} are"
                )
    return messages


def _turn(messages: list[_Message], *, joins_text: bool) -> _Message:
    """The assistant's message that goes on: the last one if it has calls, or any with `joins_text`; or a new one."""
    last = messages[-1] if messages else None
    if last is None or last["role"] != "assistant" or not (joins_text or "tool_calls" in last):
        last = {"role": "assistant", "content": ""}
        messages.append(last)
    return last


def _take_over(turn: _Message, text: str, reasoning: str) -> None:
    turn["content"] += text
    if reasoning:
        turn["reasoning_content"] = turn.get("reasoning_content", "") + reasoning


def _message(where: str, item: InputItem) -> _Message:
    if item.role not in ROLES:
        raise InvalidRequest(f"`{where}` must have a `role`: {', '.join(ROLES)}")
    if item.content is None:
        raise InvalidRequest(f"`{where}` must have `content`")
    return {"role": item.role, "content": _text(where, item.content)}


def _call(where: str, item: InputItem) -> dict[str, Any]:
    function = {
        "name": _given(where, item, "name"),
        "arguments": _given(where, item, "arguments"),
    }
    return {"id": item.call_id, "type": "function", "function": function}


def _reasoning(where: str, item: InputItem) -> str:
    text = _text(where, item.content or item.summary or "")
    if not text and item.encrypted_content:
        raise InvalidRequest(f"`{where}` is encrypted reasoning, which only the server that wrote it can read")
    return text


def _given(where: str, item: InputItem, name: str) -> Any:
    value = getattr(item, name)
    if value is None:
        raise InvalidRequest(f"`{where}` of type {item.type} must have `{name}`")
    return value


def _text(where: str, content: str | list[dict[str, Any]]) -> str:
    if isinstance(content, str):
        return content
    texts: list[str] = []
    for part in content:
        text = part.get("text")
        if part.get("type") not in TEXT_PARTS or not isinstance(text, str):
            kind = str(part.get("type"))[:40]
            raise InvalidRequest(f"parts of `{where}` must be of type input_text; this model reads no {kind!r}")
        texts.append(text)
    return "".join(texts)
