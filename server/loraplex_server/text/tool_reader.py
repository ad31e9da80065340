"""A model's answer, in pieces, taken apart into text for the user and calls of tools."""

from collections.abc import Callable, Collection

from loraplex_server.text.call_reader import CallReader
from loraplex_server.text.tool_formats import ToolFormat
from loraplex_server.text.tools import CallDelta

_BLANKS = " \t\r\n"


class ToolReader:
    """Reads one answer in one format. What turns out to be no call comes out as the text that it was.

    Nothing of a call is given out before its name is known, and then the name and the arguments' text as it comes. A
    bare JSON object is a call only if it names one of `names`. Without `is_parallel` only the first call counts, and
    what follows it is left out.
    """

    def __init__(self, tool_format: ToolFormat, names: Collection[str], *, is_parallel: bool = True):
        self._format = tool_format
        self._names = names
        self._is_parallel = is_parallel
        # A list's signs are layout, except where a marker begins with one.
        self._layout = _BLANKS if tool_format.name_first else f"{_BLANKS},;[]"
        self._step: Callable[[], bool] = self._begin if tool_format.is_bare else self._read_text
        self._held = ""  # not looked at yet
        self._undecided = ""  # looked at, and text again if no call comes of it
        self._blanks = ""  # in front of text; left out if a call comes instead
        self._has_text = False
        self._is_marked = False
        self._is_announced = False
        self._call = CallReader()
        self._text = ""
        self._calls: list[CallDelta] = []
        self.num_calls = 0

    def feed(self, piece: str) -> tuple[str, list[CallDelta]]:
        """Take the next piece; returns what it adds to the text and to the calls."""
        self._held += piece
        while self._step():
            pass
        return self._taken()

    def end(self) -> tuple[str, list[CallDelta]]:
        """End the answer; returns what was held back."""
        if self.num_calls == 0:
            self._say(self._undecided + self._held)
            self._text += self._blanks
        elif self._step == self._read_text:
            self._say(self._held)
        self._undecided = self._held = self._blanks = ""
        return self._taken()

    def _taken(self) -> tuple[str, list[CallDelta]]:
        text, self._text = self._text, ""
        calls, self._calls = self._calls, []
        return text, calls

    def _say(self, text: str) -> None:
        if self._has_text or text.strip():
            self._text += self._blanks + text
            self._has_text, self._blanks = True, ""
        else:
            self._blanks += text

    def _begin(self) -> bool:
        """The beginning of an answer that may be a call without a marker."""
        start = self._held.lstrip()
        if not start or (start != self._format.marker and self._format.marker.startswith(start)):
            return False
        self._step = self._read_between if start[0] in "{[" else self._read_text
        return True

    def _read_text(self) -> bool:
        """Text, until a marker."""
        marker = self._format.marker
        place = self._held.find(marker)
        if place < 0:
            kept = len(self._held) - _overlap(self._held, marker)
            text, self._held = self._held[:kept], self._held[kept:]
            self._say(text)
            return False
        self._say(self._held[:place])
        self._held = self._held[place + len(marker) :]
        self._undecided = marker
        self._is_marked = True
        self._step = self._read_between
        return True

    def _read_between(self) -> bool:
        """What stands before, between and behind calls."""
        self._look_at(len(self._held) - len(self._held.lstrip(self._layout)))
        if not self._held:
            return False
        for known in (self._format.marker, self._format.end.strip()):
            if known and self._held.startswith(known):
                self._look_at(len(known))
                return True
            if known and known.startswith(self._held):
                return False
        if self._format.name_first:
            return self._read_name()
        if self._held[0] != "{":
            self._give_up()
            return True
        self._call = CallReader()
        self._step = self._read_call
        return True

    def _read_name(self) -> bool:
        """A name in front of its arguments; a marker and the call's id may stand between."""
        place = self._held.find("{")
        head = self._held if place < 0 else self._held[:place]
        name = head.split("[")[0].strip()
        if any(character.isspace() for character in name) or (place == 0):
            self._give_up()
            return True
        if place < 0:
            return False
        self._look_at(place)
        self._call = CallReader(name)
        self._step = self._read_call
        return True

    def _read_call(self) -> bool:
        call = self._call
        self._look_at(call.feed(self._held))
        if call.name is not None and not self._is_announced:
            if not self._is_marked and call.name not in self._names:
                self._give_up()
                return True
            self._is_announced = True
            self._has_text, self._blanks = False, ""
            self._calls.append(CallDelta(self.num_calls, call.name, ""))
            self.num_calls += 1
        if self._is_announced:
            self._undecided = ""
            arguments = call.take_arguments()
            if arguments:
                self._calls.append(CallDelta(self.num_calls - 1, None, arguments))
        if not (call.is_done or call.is_broken):
            return False
        if self._is_announced:
            self._is_announced = False
            self._step = self._read_between if self._is_parallel else self._skip_rest
        else:
            self._give_up()
        return True

    def _look_at(self, count: int) -> None:
        self._undecided += self._held[:count]
        self._held = self._held[count:]

    def _give_up(self) -> None:
        """What was taken for a call is text; what is only the layout of earlier calls is left out."""
        if self.num_calls == 0 or "{" in self._undecided:
            self._say(self._undecided)
        self._undecided = ""
        self._is_marked = False
        self._step = self._read_text

    def _skip_rest(self) -> bool:
        self._held = ""
        return False


def _overlap(text: str, marker: str) -> int:
    """The length of the longest end of `text` that is a beginning of `marker`."""
    for length in range(min(len(text), len(marker) - 1), 0, -1):
        if marker.startswith(text[-length:]):
            return length
    return 0
