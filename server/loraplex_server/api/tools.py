"""The grammar of a chat that must call a tool, and answers taken apart into thoughts, text and calls."""

import dataclasses
import secrets
import string
from dataclasses import dataclass

from msgspec import UNSET

from loraplex_server.api.choices import ChoiceText
from loraplex_server.api.job import TextDelta
from loraplex_server.api.schemas.openai_answers import CalledFunction, ChatReason, ToolCall, ToolCallDelta
from loraplex_server.api.state import Serving
from loraplex_server.errors import InvalidRequest, ToolFailed
from loraplex_server.text.guides import Guide
from loraplex_server.text.reasoning_reader import ReasoningReader
from loraplex_server.text.tool_formats import ToolFormat, tools_guide
from loraplex_server.text.tool_reader import ToolReader
from loraplex_server.text.tools import CallDelta, ToolUse

# The templates of Mistral's models refuse every other form of an id.
MISTRAL_ID_LENGTH = 9


async def call_guide(serving: Serving, use: ToolUse, answer: Guide | None) -> Guide | None:
    """The guide of an answer that must call a tool, or may instead of the `answer` that was asked for; or None.

    Raises ToolFailed, naming the tool.
    """
    special_id = serving.generator.tokenizer.special_id
    guide = tools_guide(serving.tool_format, use, special_id, answer)
    if guide is None:
        return None
    compile_guide = serving.generator.admission.grammar
    try:
        await compile_guide(guide)
    except InvalidRequest:
        for tool in use.callable_tools:
            only = dataclasses.replace(use, choice="required", callable_names=(tool.name,))
            alone = tools_guide(serving.tool_format, only, special_id)
            assert alone is not None, "a call is still asked for"
            try:
                await compile_guide(alone)
            except InvalidRequest as error:
                raise ToolFailed(f"the parameters of the tool {tool.name!r}: {error}") from None
        raise
    return guide


@dataclass(frozen=True, slots=True)
class Piece:
    """What one token adds to an answer."""

    text: str
    calls: list[ToolCallDelta]
    thought: str = ""


class MessageReader:
    """What one choice shows: its text, its thoughts where they are told apart, and its calls if it may make any."""

    def __init__(
        self, text: ChoiceText, use: ToolUse | None, tool_format: ToolFormat, thoughts: ReasoningReader | None = None
    ):
        self._text = text
        self._thoughts = thoughts
        self._use = use
        self._format = tool_format
        self._reader = None if use is None else ToolReader(tool_format, use.callable_names, is_parallel=use.is_parallel)

    def feed(self, delta: TextDelta) -> tuple[list[Piece], ChatReason | None]:
        """A piece for each token of the delta, and why the choice ended if it did."""
        texts, reason = self._text.feed(delta)
        last = len(texts) - 1 if reason is not None else None
        pieces = [self._piece(text, is_last=place == last) for place, text in enumerate(texts)]
        has_calls = self._reader is not None and self._reader.num_calls > 0
        # OpenAI says «stop» where the client named the function.
        if reason == "stop" and has_calls and self._use is not None and self._use.choice != "named":
            return pieces, "tool_calls"
        return pieces, reason

    @property
    def num_thought_tokens(self) -> int:
        """Tokens that the model thought with, so far."""
        return 0 if self._thoughts is None else self._thoughts.num_thought_pieces

    def _piece(self, text: str, *, is_last: bool) -> Piece:
        thought = ""
        if self._thoughts is not None:
            thought, text = self._thoughts.feed(text)
            if is_last:
                late_thought, late_text = self._thoughts.end()
                thought, text = thought + late_thought, text + late_text
        if self._reader is None:
            return Piece(text, [], thought)
        said, calls = self._reader.feed(text)
        if is_last:
            rest, late = self._reader.end()
            said, calls = said + rest, calls + late
        return Piece(said, [self._delta(call) for call in calls], thought)

    def _delta(self, call: CallDelta) -> ToolCallDelta:
        if call.name is None:
            return ToolCallDelta(call.index, CalledFunction(arguments=call.arguments))
        function = CalledFunction(name=call.name, arguments=call.arguments)
        return ToolCallDelta(call.index, function, id=self._new_id(), type="function")

    def _new_id(self) -> str:
        if self._format.name == "mistral":
            return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(MISTRAL_ID_LENGTH))
        return f"call_{secrets.token_hex(12)}"


def whole_calls(pieces: list[Piece]) -> list[ToolCall]:
    """The calls of a finished answer."""
    calls: list[ToolCall] = []
    arguments: list[str] = []
    for delta in (delta for piece in pieces for delta in piece.calls):
        if delta.id is not UNSET:
            calls.append(ToolCall(str(delta.id), delta.function))
            arguments.append("")
        arguments[-1] += delta.function.arguments
    return [
        ToolCall(call.id, CalledFunction(name=call.function.name, arguments=text))
        for call, text in zip(calls, arguments, strict=True)
    ]
