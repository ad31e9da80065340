"""Whether and when a lost engine is started again; decides, and touches nothing."""

# An engine that has served for so long was started well: the next loss is a new fault, not the old one again.
FORGIVEN_S = 600.0
LONGEST_DELAY_S = 30.0


class Restarts:
    """Counts the losses in a row: at most `limit` of them are followed by another start."""

    def __init__(self, limit: int):
        self.limit = limit
        self.num_in_a_row = 0
        self._ready_at: float | None = None

    def delay_s(self, now: float) -> float | None:
        """The engine is lost at `now`: how long to wait before it is started again; None when it is not."""
        if self._ready_at is not None and now - self._ready_at >= FORGIVEN_S:
            self.num_in_a_row = 0
        self._ready_at = None
        if self.num_in_a_row >= self.limit:
            return None
        self.num_in_a_row += 1
        # The first is at once: most faults do not come back. Then 1, 2, 4 … seconds.
        return 0.0 if self.num_in_a_row == 1 else min(2.0 ** (self.num_in_a_row - 2), LONGEST_DELAY_S)

    def ready(self, now: float) -> None:
        """The engine serves since `now`."""
        self._ready_at = now
