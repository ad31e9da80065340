"""Text that leaves out the stop string that ended it, though its pieces are sent before the end is known."""

from collections.abc import Sequence


class StopTextFilter:
    """Takes the pieces of a text and gives out what can be no part of a stop string."""

    def __init__(self, stop: Sequence[str]):
        self._stop = sorted(stop, key=len, reverse=True)
        self._held = ""

    def feed(self, piece: str) -> str:
        """Take the next piece; returns what is sure to stay."""
        if not self._stop:
            return piece
        text = self._held + piece
        kept = len(text) - self._num_doubtful(text)
        self._held = text[kept:]
        return text[:kept]

    def end(self) -> tuple[str, bool]:
        """End the text; returns what was held back, without a stop string at its end, and whether there was one."""
        held, self._held = self._held, ""
        for stop in self._stop:
            if held.endswith(stop):
                return held.removesuffix(stop), True
        return held, False

    def _num_doubtful(self, text: str) -> int:
        """The length of the longest end of `text` that is a stop string or the beginning of one."""
        for length in range(min(len(text), len(self._stop[0])), 0, -1):
            end = text[-length:]
            if any(stop.startswith(end) for stop in self._stop):
                return length
        return 0
