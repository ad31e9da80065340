"""`tools` and `tool_choice` as OpenAI's and TGI's clients write them, read into a ToolUse."""

from collections.abc import Mapping, Sequence
from typing import Any

from loraplex_server.errors import ToolFailed
from loraplex_server.text.tools import Tool, ToolUse

MAX_TOOLS = 128
MAX_NAME_LENGTH = 128


def read_tool_use(tools: Sequence[Any] | None, choice: Any, is_parallel: bool | None) -> ToolUse | None:
    """What a request wants of its tools; None when no tool may be called. Raises ToolFailed.

    Of tools that are listed and not allowed the model is shown nothing, so that it has none to call but the others.
    """
    kind, names = _read_choice(choice)
    if kind == "none":
        return None
    if not tools:
        if kind != "auto" or names is not None:
            raise ToolFailed("`tool_choice` asks for a call, but there are no `tools`")
        return None
    known = read_tools(tools)
    for name in names or ():
        if name not in [tool.name for tool in known]:
            raise ToolFailed(f"Tool with name {name[:MAX_NAME_LENGTH]} not found")
    if kind == "named":
        return ToolUse(tools=known, choice="named", is_parallel=False, callable_names=names or ())
    allowed = known if names is None else tuple(tool for tool in known if tool.name in names)
    return ToolUse(
        tools=allowed,
        choice="required" if kind == "required" else "auto",
        is_parallel=is_parallel is not False,
        callable_names=tuple(tool.name for tool in allowed),
    )


def _read_choice(choice: Any) -> tuple[str, tuple[str, ...] | None]:
    """auto, none, required or named; and the names that it allows, where it names some."""
    if choice is None:
        return "auto", None
    if isinstance(choice, str) and choice in ("auto", "none", "required"):
        return str(choice), None
    if isinstance(choice, str) and choice:
        return "named", (choice,)  # TGI's short form
    if isinstance(choice, dict) and choice.get("type", "function") == "function":
        name = _name_in(choice)
        if name is not None:
            return "named", (name,)
    if isinstance(choice, dict) and choice.get("type") == "allowed_tools":
        return _read_allowed(choice)
    raise ToolFailed("`tool_choice` must be auto, none, required or a function: {type: function, function: {name}}")


def _read_allowed(choice: Mapping[str, Any]) -> tuple[str, tuple[str, ...]]:
    """OpenAI's list of allowed tools: as chat has it, in an object of its own, or as responses have it."""
    inner = choice.get("allowed_tools", choice)
    mode, tools = (inner.get("mode"), inner.get("tools")) if isinstance(inner, dict) else (None, None)
    names = [_name_in(tool) for tool in tools] if isinstance(tools, list) else []
    if mode not in ("auto", "required") or not names or None in names:
        raise ToolFailed(
            "`tool_choice` of type allowed_tools must have `mode`, auto or required, and functions as `tools`"
        )
    return str(mode), tuple(str(name) for name in names)


def _name_in(given: Any) -> str | None:
    """The name of a function, which chat nests and responses do not."""
    function = given.get("function", given) if isinstance(given, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    return name if isinstance(name, str) and name else None


def read_tools(tools: Sequence[Any]) -> tuple[Tool, ...]:
    """The tools of a list. Raises ToolFailed, naming the tool."""
    if len(tools) > MAX_TOOLS:
        raise ToolFailed(f"`tools` must have at most {MAX_TOOLS} entries. Given: {len(tools)}")
    known = tuple(_read_tool(f"tools[{place}]", tool) for place, tool in enumerate(tools))
    names = [tool.name for tool in known]
    for name in names:
        if names.count(name) > 1:
            raise ToolFailed(f"`tools` has more than one tool with the name {name!r}")
    return known


def _read_tool(where: str, tool: Any) -> Tool:
    function = tool.get("function") if isinstance(tool, dict) else None
    if not isinstance(function, dict) or tool.get("type", "function") != "function":
        raise ToolFailed(f"`{where}` must be an object of type function with a `function`")
    return read_function(f"{where}.function", function)


def read_function(where: str, function: Mapping[str, Any]) -> Tool:
    """One function: its name, description, parameters and whether they are strict. Raises ToolFailed."""
    name = function.get("name")
    if not isinstance(name, str) or not 0 < len(name) <= MAX_NAME_LENGTH or any(one in name for one in " \n\t[{"):
        raise ToolFailed(f"`{where}.name` must be 1 to {MAX_NAME_LENGTH} characters without blanks, [ or {{")
    description = function.get("description")
    if description is not None and not isinstance(description, str):
        raise ToolFailed(f"`{where}.description` of {name!r} must be a text")
    parameters = function.get("parameters", function.get("arguments"))  # TGI knows both names
    if parameters is None:
        parameters = {"type": "object", "properties": {}}
    if not isinstance(parameters, dict) or parameters.get("type", "object") != "object":
        raise ToolFailed(f"`{where}.parameters` of {name!r} must be a JSON schema of an object")
    return Tool(name=name, description=description, parameters=parameters, is_strict=function.get("strict") is True)


def check_tool_messages(messages: Sequence[Mapping[str, Any]]) -> None:
    """Raises ToolFailed for a tool's answer to a call that was never made."""
    has_calls = False
    called: set[str] = set()
    for message in messages:
        for call in message.get("tool_calls") or ():
            has_calls = True
            called.add(str(call.get("id")))
        if message["role"] != "tool":
            continue
        call_id = message.get("tool_call_id")
        if not has_calls or (call_id is not None and call_id not in called):
            raise ToolFailed(f"a message of the role tool answers the call {str(call_id)[:80]!r}, which was not made")
