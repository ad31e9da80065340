"""One call of a tool, read from JSON text that arrives in pieces: its name, and its arguments as they come."""

import json

_NAME_KEYS = ("name", "function")
_ARGUMENT_KEYS = ("arguments", "parameters")
_SPACES = " \t\r\n"


class CallReader:
    """Reads `{"name": …, "arguments": {…}}`, in any order of keys and inside a "function" object or not.

    With a `name` it reads the arguments alone. Arguments are passed on as they stand in the text; those in a JSON
    string are taken out of it, and absent or null ones are an empty object. Nothing is passed on before the name.
    """

    def __init__(self, name: str | None = None):
        self.name = name
        self.is_done = False
        self.is_broken = False
        self._has_arguments = False
        self._only_arguments = name is not None
        self._depth = 0  # of objects whose keys are looked at: the call, and a "function" object in it
        self._expected = "value" if self._only_arguments else "open"
        self._key = "arguments"
        self._value = ""  # what was read of a key or value; of arguments that are an object nothing is kept
        self._nesting = 0
        self._in_string = False
        self._is_escaped = False
        self._ready = ""

    def feed(self, text: str) -> int:
        """Take characters up to the end of the call; returns how many were taken."""
        for place, character in enumerate(text):
            self._take(character)
            if self.is_broken or self.is_done:
                return place + 1
        return len(text)

    def take_arguments(self) -> str:
        """The arguments' text that has come since the last call; nothing as long as the name is not known."""
        if self.name is None:
            return ""
        ready, self._ready = self._ready, ""
        return ready

    def _take(self, character: str) -> None:
        match self._expected:
            case "key text" | "value text":
                self._take_value(character)
            case _ if character in _SPACES:
                pass
            case "open" if character == "{":
                self._depth, self._expected = 1, "key or end"
            case "key" | "key or end" if character == '"':
                self._begin("key text", character)
            case "key or end" | "comma" if character == "}":
                self._close()
            case "colon" if character == ":":
                self._expected = "value"
            case "comma" if character == ",":
                self._expected = "key"
            case "value" if self._key == "function" and character == "{" and self._depth == 1:
                self._depth, self._expected = 2, "key or end"
            case "value" if character not in ",:}]":
                self._begin("value text", character)
            case _:
                self.is_broken = True

    def _begin(self, expected: str, character: str) -> None:
        self._expected = expected
        self._value = ""
        self._nesting = 0
        self._in_string = self._is_escaped = False
        self._take_value(character)

    def _take_value(self, character: str) -> None:
        """One character of a key or value: a string, an object or list, or a word, which the next character ends."""
        if self._in_string:
            self._keep(character)
            if self._is_escaped:
                self._is_escaped = False
            elif character == "\\":
                self._is_escaped = True
            elif character == '"':
                self._in_string = False
                if self._nesting == 0:
                    self._end_value()
            return
        is_word = self._nesting == 0 and self._value != ""
        if is_word and character in ",}" + _SPACES:
            self._end_value()
            if not (self.is_broken or self.is_done):
                self._take(character)
            return
        self._keep(character)
        if character == '"':
            self._in_string = True
        elif character in "{[":
            self._nesting += 1
        elif character in "}]":
            self._nesting -= 1
            if self._nesting == 0:
                self._end_value()

    @property
    def _is_argument(self) -> bool:
        return self._expected == "value text" and self._key in _ARGUMENT_KEYS

    def _keep(self, character: str) -> None:
        if self._is_argument and (character == "{" or self._nesting > 0) and not self._value:
            self._ready += character
        else:
            self._value += character

    def _end_value(self) -> None:
        if self._expected == "key text":
            self._key = str(_loaded(self._value))
            self._expected = "colon"
            return
        if self._is_argument:
            self._end_arguments()
        elif self._key in _NAME_KEYS:
            name = _loaded(self._value)
            self.name = name if isinstance(name, str) and name else self.name
        self._expected = "comma"
        if self._only_arguments:
            self._finish()

    def _end_arguments(self) -> None:
        self._has_arguments = True
        if self._value:
            given = _loaded(self._value)
            self._ready += given if isinstance(given, str) and given else "{}"

    def _close(self) -> None:
        self._depth -= 1
        self._expected = "comma"
        if self._depth == 0:
            self._finish()

    def _finish(self) -> None:
        if self.name is None:
            self.is_broken = True
            return
        if not self._has_arguments:
            self._ready += "{}"
        self.is_done = True


def _loaded(text: str) -> object:
    try:
        return json.loads(text)
    except ValueError:
        return None
