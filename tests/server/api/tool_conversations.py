"""What tests of tools share: two functions, a template that shows them, and a compiler that takes every grammar."""

import msgspec
from scripted_engine import READY

from loraplex_server.errors import InvalidRequest
from loraplex_server.text.guides import Guide

CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = {
    "type": "function",
    "function": {"name": "weather", "description": "Tells the weather", "parameters": CITY},
}
ADD = {"type": "function", "function": {"name": "add", "parameters": None}}
TOOLS = [WEATHER, ADD]
CALL = '{"name": "weather", "arguments": {"city": "Paris"}}'
HERMES = "<tool_call>\n{}\n</tool_call>".format
# Long prompts and answers, for the tools are in them.
WIDE = msgspec.structs.replace(READY, max_input_tokens=4000, max_total_tokens=5000)
SHOWS_TOOLS = (
    "{% for t in tools or [] %}T:{{ t.function | tojson }};{% endfor %}"
    "{% for m in messages %}{{ m.role[0] }}:{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>"
    "{% endif %}{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function.name }}={{ c.function.arguments | tojson }}"
    "{% endfor %};{% endfor %}"
)


class Compiler:
    """Takes every guide but those with a bad text in them, and keeps what it was given."""

    def __init__(self, bad: str | None = None) -> None:
        self.guides: list[Guide] = []
        self._bad = bad

    async def __call__(self, guide: Guide) -> str:
        self.guides.append(guide)
        if self._bad is not None and self._bad in guide.text:
            raise InvalidRequest("grammar is not valid: no such thing")
        return f"G:{guide.text}"
