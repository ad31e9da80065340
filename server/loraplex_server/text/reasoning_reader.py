"""A model's answer, in pieces, taken apart into what it thinks and what it says."""

START, END = "<think>", "</think>"
MARKERS = frozenset({START, END})
# The one of `--reasoning-parser` whose models may begin with their thoughts at once.
ALWAYS_OPEN = "deepseek_r1"


class ReasoningReader:
    """Reads one answer. Thoughts stand at its beginning between the markers, with `is_open` without the first one.

    White space around the markers belongs to neither. An answer that does not begin with the marker has no thoughts,
    and one that ends before the second marker has nothing else.
    """

    def __init__(self, *, is_open: bool):
        self.num_thought_pieces = 0  # those that held thoughts or a marker
        self._is_thinking = is_open
        self._is_decided = is_open
        self._num_undecided = 0
        self._is_begun = False  # whether what comes now, thoughts or text, has shown anything
        self._follows_thoughts = is_open
        self._held = ""  # may be a marker, or white space in front of one

    def feed(self, piece: str) -> tuple[str, str]:
        """Take the next piece; returns what it adds to the thoughts and to the text."""
        self._held += piece
        self.num_thought_pieces += self._is_thinking
        if not self._is_decided:
            self._num_undecided += 1
            start = self._held.lstrip()
            if START.startswith(start) and start != START:
                return "", ""
            self._is_decided = True
            self._is_thinking = start.startswith(START)
            if self._is_thinking:
                self.num_thought_pieces = self._num_undecided
                self._held = start.removeprefix(START)
                self._follows_thoughts = True
        if not self._is_thinking:
            return "", self._said()
        before, marker, after = self._held.partition(END)
        if marker:
            thought = self._thought(before.rstrip())
            self._held, self._is_thinking, self._is_begun = after, False, False
            return thought, self._said()
        kept = len(before) - _num_doubtful(before)
        self._held = before[kept:]
        return self._thought(before[:kept]), ""

    def end(self) -> tuple[str, str]:
        """End the answer; returns what was held back."""
        held, self._held = self._held, ""
        return (self._thought(held.rstrip()), "") if self._is_thinking else ("", held)

    def _thought(self, text: str) -> str:
        text = text if self._is_begun else text.lstrip()
        self._is_begun = self._is_begun or text != ""
        return text

    def _said(self) -> str:
        text, self._held = self._held, ""
        return self._thought(text) if self._follows_thoughts else text


def _num_doubtful(text: str) -> int:
    """The length of the end of `text` that may be white space in front of the second marker, or a part of it."""
    length = max((n for n in range(1, len(END)) if text.endswith(END[:n])), default=0)
    kept = text[: len(text) - length]
    return length + len(kept) - len(kept.rstrip())
