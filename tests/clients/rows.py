"""What every client's script of the matrix uses: rows that pass or fail, one line of JSON each on standard output.

Imports nothing but the standard library: the scripts run in environments of their own.
"""

import asyncio
import inspect
import json
import sys
import traceback
from collections.abc import Callable
from typing import Any

QUESTION = "What is the capital of France?"
ASK: list[Any] = [{"role": "user", "content": QUESTION}]
PROMPT = (
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    f"<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n"
)
# How the demo's pirate begins whatever it is asked.
PIRATE = "Yo ho ho!"
SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 12}, "size": {"enum": ["small", "large"]}},
    "required": ["city", "size"],
    "additionalProperties": False,
}
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 12}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}

_rows: list[tuple[str, Callable[[str], Any]]] = []


def row(function: Callable[[str], Any]) -> Callable[[str], Any]:
    """Make a function a row of the matrix; it gets the server's address, and passes unless it raises."""
    _rows.append((function.__name__.replace("_", " "), function))
    return function


def is_answer(text: str) -> None:
    """The text is JSON of SCHEMA's shape."""
    answer = json.loads(text)
    assert set(answer) == {"city", "size"} and answer["size"] in ("small", "large"), text


def is_weather_call(name: str | None, arguments: str | dict[str, Any]) -> None:
    """The call is one that WEATHER allows."""
    found = json.loads(arguments) if isinstance(arguments, str) else arguments
    assert name == "get_weather" and set(found) == {"city"} and isinstance(found["city"], str), (name, arguments)


def raises(kind: type[BaseException], call: Callable[[], Any]) -> str:
    """The text of the exception that the call must raise."""
    try:
        call()
    except kind as error:
        return str(error)
    raise AssertionError(f"{kind.__name__} was not raised")


def main() -> None:
    """Run the rows of this script, those alone whose names hold the second argument if there is one."""
    url, wanted = sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else ""
    for name, function in _rows:
        if wanted not in name:
            continue
        try:
            result = function(url)
            if inspect.isawaitable(result):
                asyncio.run(result)  # type: ignore[arg-type]
            found = {"row": name, "ok": True, "why": ""}
        except Exception as error:
            last = traceback.extract_tb(error.__traceback__)
            own = [frame for frame in last if "tests/clients" in frame.filename]
            place = f"line {own[-1].lineno}: " if own else ""
            found = {"row": name, "ok": False, "why": f"{place}{type(error).__name__}: {error}"[:600]}
        print(json.dumps(found), flush=True)
