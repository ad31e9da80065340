"""Tools that a model may call, and the calls it makes, in no dialect."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class Tool:
    """A function that the client can run; `is_strict` enforces all of the schema of its parameters."""

    name: str
    description: str | None
    parameters: Mapping[str, Any]  # a JSON schema of an object
    is_strict: bool = False

    def as_function(self) -> dict[str, Any]:
        """The tool as chat templates expect it."""
        function: dict[str, Any] = {"name": self.name, "parameters": dict(self.parameters)}
        if self.description is not None:
            function["description"] = self.description
        return {"type": "function", "function": function}


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolUse:
    """The tools of one request, those that may be called first; and whether one must be."""

    tools: tuple[Tool, ...]
    choice: Literal["auto", "required", "named"] = "auto"
    is_parallel: bool = True
    callable_names: tuple[str, ...]

    @property
    def callable_tools(self) -> tuple[Tool, ...]:
        """The tools that may be called: all, or the named one."""
        return tuple(tool for tool in self.tools if tool.name in self.callable_names)


@dataclass(frozen=True, slots=True)
class CallDelta:
    """What a piece of text adds to a call: the name with the first delta, then its arguments' JSON text."""

    index: int
    name: str | None
    arguments: str
