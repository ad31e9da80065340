"""Tools in a prompt: as the model's chat template wants them, or written out for a template that knows none."""

import json
from collections.abc import Sequence
from typing import Any

from loraplex_server.text.tools import Tool

# In TGI's manner: such a model was not taught any format, so it is told one.
TOOL_PROMPT = (
    "Given the functions available, please respond with a JSON for a function call with its proper arguments that "
    'best answers the given prompt. Respond in the format {"name": function name, "arguments": dictionary of argument '
    "name and its value}. Do not use variables."
)

Message = dict[str, Any]


def with_tools_written_out(
    messages: Sequence[Message], tools: Sequence[Tool], tool_prompt: str | None
) -> list[Message]:
    """The messages with the tools and what to do with them at the end of the last message of a user."""
    listed = json.dumps([tool.as_function() for tool in tools], ensure_ascii=False)
    return _with_appended(messages, f"{listed}\n{tool_prompt or TOOL_PROMPT}")


def with_tool_prompt(messages: Sequence[Message], tool_prompt: str) -> list[Message]:
    """The messages with a client's own words about tools at the end of the last message of a user."""
    return _with_appended(messages, tool_prompt)


def _with_appended(messages: Sequence[Message], text: str) -> list[Message]:
    places = [place for place, message in enumerate(messages) if message["role"] == "user"]
    place = places[-1] if places else len(messages) - 1
    message = messages[place]
    changed = {**message, "content": f"{message.get('content') or ''}\n---\n{text}"}
    return [*messages[:place], changed, *messages[place + 1 :]]


def with_calls_as_objects(messages: Sequence[Message]) -> list[Message]:
    """The messages with the arguments of earlier calls as objects: templates write them as JSON themselves."""
    return [
        {**message, "tool_calls": [_with_parsed_arguments(call) for call in message["tool_calls"]]}
        if message.get("tool_calls")
        else message
        for message in messages
    ]


def _with_parsed_arguments(call: Any) -> Any:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"] or "{}")
    except (ValueError, RecursionError):
        return call
    return {**call, "function": {**function, "arguments": arguments}} if isinstance(arguments, dict) else call


def with_calls_written_out(messages: Sequence[Message]) -> list[Message]:
    """The messages with earlier calls as JSON in their contents, for a template that shows contents only."""
    return [
        {**message, "content": (message.get("content") or "") + json.dumps(message["tool_calls"], ensure_ascii=False)}
        if message.get("tool_calls")
        else message
        for message in messages
    ]
