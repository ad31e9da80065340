"""Which steps are planned and not read yet, and who has ended while one of them names it."""

from loraplex_server.engine.sequence import Sequence


class StepsInFlight:
    """The steps from the one after the last that was read to the one planned last; true when there are any.

    What a step reads and writes (its rows' KV blocks, slots and sampling) is decided when it is planned and done at any
    time until it is read. Whoever ends meanwhile stays in `leaving`, with all it holds.
    """

    def __init__(self) -> None:
        self._planned = 0
        self._read = 0
        self.leaving: list[Sequence] = []

    def __bool__(self) -> bool:
        return self._read < self._planned

    @property
    def next_id(self) -> int:
        """The number of the step that is planned next."""
        return self._planned + 1

    def add(self) -> int:
        """A step is planned; returns its number."""
        self._planned += 1
        return self._planned

    def has(self, sequence: Sequence) -> bool:
        """Whether one of them has the sequence in it."""
        return sequence.last_step > self._read

    def read(self, step_id: int) -> list[Sequence]:
        """A step is read; returns those that have left and are in none of the others."""
        self._read = step_id
        if not self.leaving:
            return []
        gone = [sequence for sequence in self.leaving if not self.has(sequence)]
        self.leaving = [sequence for sequence in self.leaving if self.has(sequence)]
        return gone
