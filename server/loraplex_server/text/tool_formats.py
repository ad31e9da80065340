"""How families of models write a call of a tool, and the grammar that makes any model write it so."""

import json
from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from loraplex_server.errors import InvalidRequest
from loraplex_server.text.guides import Guide, checked_guide, lark_text
from loraplex_server.text.json_schema import SchemaError, laid_out, schema_text
from loraplex_server.text.tools import Tool, ToolUse

# A model that must call tools, and may go on, could call them for ever.
MAX_CALLS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolFormat:
    """One way of writing calls: marker, JSON object, end.

    The marker stands before each call, or with `marks_all` before all of them. `is_bare`: an answer that begins with
    a JSON object may be a call without a marker. `name_first`: the name stands before its arguments' object.
    """

    name: str
    marker: str
    behind_marker: str = ""
    end: str = ""
    separator: str
    marks_all: bool = False
    arguments_key: str = "arguments"
    is_bare: bool = False
    name_first: bool = False
    name_end: str = ""

    @property
    def markers(self) -> frozenset[str]:
        """Texts that are special tokens in some vocabularies and must be seen all the same."""
        return frozenset({self.marker, self.end.strip(), self.name_end} - {""})


HERMES = ToolFormat(name="hermes", marker="<tool_call>", behind_marker="\n", end="\n</tool_call>", separator="\n")
LLAMA3_JSON = ToolFormat(
    name="llama3_json", marker="<|python_tag|>", separator="; ", arguments_key="parameters", is_bare=True
)
MISTRAL = ToolFormat(name="mistral", marker="[TOOL_CALLS]", behind_marker="[", end="]", separator=", ", marks_all=True)
# From the tokenizer v11 on; the same name in vLLM.
MISTRAL_NAME_FIRST = ToolFormat(name="mistral", marker="[TOOL_CALLS]", separator="", name_first=True, name_end="[ARGS]")
JSON = ToolFormat(name="json", marker="<tool_call>", end="\n</tool_call>", separator="\n", is_bare=True)

_BY_NAME = {one.name: one for one in (HERMES, LLAMA3_JSON, MISTRAL, JSON)}


def find_format(name: str, template_source: str) -> ToolFormat:
    """The format of a name, or with «auto» the one that the model's chat template writes."""
    if name == "auto":
        if "[TOOL_CALLS]" in template_source:
            name = "mistral"
        elif "<tool_call>" in template_source:
            name = "hermes"
        elif "<|python_tag|>" in template_source or "ipython" in template_source:
            name = "llama3_json"
        else:
            name = "json"
    found = _BY_NAME[name]
    return MISTRAL_NAME_FIRST if found is MISTRAL and "[ARGS]" in template_source else found


def tools_guide(
    tool_format: ToolFormat, use: ToolUse, special_token: Callable[[str], int | None], answer: Guide | None = None
) -> Guide | None:
    """The guide of an answer that must call a tool, in the model's own format; None where it need not.

    With the schema of an `answer` in place of calls, one that need not is of that schema or calls a tool.
    `special_token` gives the id of a text that is a special token. Raises InvalidRequest where it gets too large.
    """
    if use.choice == "auto" and answer is None:
        return None

    def literal(text: str) -> list[str]:
        token_id = special_token(text.strip())
        if token_id is None:
            return [lark_text(text)] if text else []
        before, _, after = text.partition(text.strip())
        return [*literal(before), f"<[{token_id}]>", *literal(after)]

    tools = use.callable_tools
    # Bare formats are read from the first brace, so that their marker need not be there.
    marker = [] if tool_format.is_bare else literal(tool_format.marker) + literal(tool_format.behind_marker)
    end = [] if tool_format.is_bare else literal(tool_format.end)
    more = f"({' '.join([*literal(tool_format.separator), 'call'])}){{0,{MAX_CALLS - 1}}}" if use.is_parallel else ""
    outside, inside = ((marker, end), ([], [])) if tool_format.marks_all else (([], []), (marker, end))
    lines = [
        "start: calls",
        " ".join(["calls:", *outside[0], "call", more, *outside[1]]),
        " ".join(["call:", *inside[0], f"({' | '.join(f'tool_{i}' for i in range(len(tools)))})", *inside[1]]),
    ]
    for i, tool in enumerate(tools):
        if tool_format.name_first:
            before, after = [lark_text(tool.name), *literal(tool_format.name_end)], []
        else:
            head = f'{{"name": {json.dumps(tool.name)}, "{tool_format.arguments_key}": '
            before, after = [lark_text(head)], [lark_text("}")]
        lines.append(" ".join([f"tool_{i}:", *before, f"arguments_{i}", *after]))
        lines.append(f"arguments_{i}: %json {_schema_of(tool)}")
    if use.choice == "auto" and answer is not None:
        lines[0] += " | answer"
        lines.append(f"answer: %json {_schema_of_answer(answer)}")
    return checked_guide("tools", Guide("lark", "\n".join(lines)))


def _schema_of(tool: Tool) -> str:
    schema = laid_out({"type": "object", **tool.parameters}, None)
    return msgspec.json.encode(schema | {"x-guidance": schema["x-guidance"] | {"lenient": not tool.is_strict}}).decode()


def _schema_of_answer(answer: Guide) -> str:
    assert answer.kind == "json_schema", "other guides do not go with tools"
    try:
        return schema_text(answer.text, answer.whitespace)
    except SchemaError as error:
        raise InvalidRequest(f"the schema of the answer {error}") from None
