"""The items of a Responses answer, made of the pieces of one choice: messages, calls, thoughts, and their events."""

import secrets
from collections.abc import Callable, Sequence
from typing import Any, Literal

from msgspec import UNSET

from loraplex_server.api.schemas.openai_answers import ChatLogprob, ToolCallDelta
from loraplex_server.api.schemas.responses_answers import (
    OutputCall,
    OutputItem,
    OutputMessage,
    OutputReasoning,
    OutputText,
    ReasoningText,
)
from loraplex_server.api.tools import Piece

# Takes an event: its kind behind «response.», and its fields.
Tell = Callable[..., None]
EndStatus = Literal["completed", "incomplete"]


class ResponseItems:
    """Feed it pieces, then `end` it; `tell` gets the events as they come, and `ended` holds the items that ended."""

    def __init__(self, tell: Tell):
        self._tell = tell
        self._open: _Message | _Call | _Reasoning | None = None
        self._logprobs: list[ChatLogprob] = []  # of tokens that have not shown yet whether they are text
        self.ended: list[OutputItem] = []

    def add(self, piece: Piece, logprobs: Sequence[ChatLogprob]) -> None:
        """Take what one token adds."""
        self._logprobs += logprobs
        if piece.thought:
            self._add_thought(piece.thought)
        calls = list(piece.calls)
        # What goes on with an open call stands before the text, what begins a call behind it.
        while calls and calls[0].id is UNSET:
            self._add_call(calls.pop(0))
        if piece.text:
            self._add_text(piece.text)
        for call in calls:
            self._add_call(call)

    def end(self, status: EndStatus) -> None:
        """End the last item with a status; an answer of nothing is an empty message."""
        if self._open is None or (self._logprobs and isinstance(self._open, _Message)):
            self._add_text("")
        self._close(status)

    def _add_text(self, text: str) -> None:
        if not isinstance(self._open, _Message):
            if self._open is not None:
                self._logprobs = _of_text(text, self._logprobs)
            self._close("completed")
            self._open = _Message(len(self.ended), self._tell)
        self._open.add(text, self._logprobs)
        self._logprobs = []

    def _add_thought(self, text: str) -> None:
        self._logprobs = []
        if not isinstance(self._open, _Reasoning):
            self._close("completed")
            self._open = _Reasoning(len(self.ended), self._tell)
        self._open.add(text)

    def _add_call(self, delta: ToolCallDelta) -> None:
        self._logprobs = []  # events have them for text alone
        if delta.id is not UNSET:
            self._close("completed")
            self._open = _Call(len(self.ended), self._tell, str(delta.id), str(delta.function.name))
        assert isinstance(self._open, _Call), "arguments follow their call's name"
        self._open.add(delta.function.arguments)

    def _close(self, status: EndStatus) -> None:
        if self._open is not None:
            self.ended.append(self._open.close(status))
            self._open = None


class _Message:
    """A message that grows."""

    def __init__(self, index: int, tell: Tell):
        self._id = f"msg_{secrets.token_hex(16)}"
        self._item_place = {"output_index": index}
        self._place = {"item_id": self._id, "output_index": index, "content_index": 0}
        self._tell = tell
        self._pieces: list[str] = []
        self._logprobs: list[ChatLogprob] = []
        tell("output_item.added", item=OutputMessage(self._id, "in_progress", []), **self._item_place)
        tell("content_part.added", part=OutputText(""), **self._place)

    def add(self, text: str, logprobs: Sequence[ChatLogprob]) -> None:
        """Take a piece of the text."""
        if text or logprobs:
            self._tell("output_text.delta", delta=text, logprobs=logprobs, **self._place)
        self._pieces.append(text)
        self._logprobs += logprobs

    def close(self, status: EndStatus) -> OutputMessage:
        """The whole item."""
        text = OutputText("".join(self._pieces), logprobs=self._logprobs)
        item = OutputMessage(self._id, status, [text])
        self._tell("output_text.done", text=text.text, logprobs=self._logprobs, **self._place)
        self._tell("content_part.done", part=text, **self._place)
        self._tell("output_item.done", item=item, **self._item_place)
        return item


class _Reasoning:
    """Thoughts that grow."""

    def __init__(self, index: int, tell: Tell):
        self._id = f"rs_{secrets.token_hex(16)}"
        self._item_place = {"output_index": index}
        self._place = {"item_id": self._id, "output_index": index, "content_index": 0}
        self._tell = tell
        self._pieces: list[str] = []
        tell("output_item.added", item=OutputReasoning(self._id, "in_progress", []), **self._item_place)
        tell("content_part.added", part=ReasoningText(""), **self._place)

    def add(self, text: str) -> None:
        """Take a piece of the thoughts."""
        self._tell("reasoning_text.delta", delta=text, **self._place)
        self._pieces.append(text)

    def close(self, status: EndStatus) -> OutputReasoning:
        """The whole item."""
        text = ReasoningText("".join(self._pieces))
        item = OutputReasoning(self._id, status, [text])
        self._tell("reasoning_text.done", text=text.text, **self._place)
        self._tell("content_part.done", part=text, **self._place)
        self._tell("output_item.done", item=item, **self._item_place)
        return item


class _Call:
    """A call whose arguments grow."""

    def __init__(self, index: int, tell: Tell, call_id: str, name: str):
        self._begun = OutputCall(f"fc_{secrets.token_hex(16)}", call_id, name, "", "in_progress")
        self._item_place = {"output_index": index}
        self._place = {"item_id": self._begun.id, "output_index": index}
        self._tell = tell
        self._pieces: list[str] = []
        tell("output_item.added", item=self._begun, **self._item_place)

    def add(self, arguments: str) -> None:
        """Take a piece of the arguments."""
        if arguments:
            self._tell("function_call_arguments.delta", delta=arguments, **self._place)
            self._pieces.append(arguments)

    def close(self, status: EndStatus) -> OutputCall:
        """The whole item."""
        begun, arguments = self._begun, "".join(self._pieces)
        item = OutputCall(begun.id, begun.call_id, begun.name, arguments, status)
        self._tell("function_call_arguments.done", name=begun.name, arguments=arguments, **self._place)
        self._tell("output_item.done", item=item, **self._item_place)
        return item


def _of_text(text: str, logprobs: list[ChatLogprob]) -> list[ChatLogprob]:
    """The last tokens, so many as the text has; those before them ended what stood before."""
    missing = len(text.encode())
    first = len(logprobs)
    while first > 0 and missing > 0:
        first -= 1
        missing -= len(logprobs[first].bytes)
    return logprobs[first:]


def untold(kind: str, **fields: Any) -> None:
    """Takes the events of an answer that is not streamed."""
