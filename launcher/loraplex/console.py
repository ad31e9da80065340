"""What a person sees while the server starts: log lines, and progress bars where there is a terminal."""

import logging
import sys
from types import TracebackType
from typing import Any, Self

from tqdm import tqdm

logger = logging.getLogger("loraplex")

# Without a terminal, a line at each of these shares says how far a phase is.
SHARES = (0, 25, 50, 75, 100)


class Console:
    """Lines through the log; at most one progress bar, which never tears a line apart."""

    def __init__(self, *, bars: bool):
        self.has_bars = bars
        self._bar: tqdm[Any] | None = None
        self._phase = ""
        self._last_share = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.end_progress()

    def line(self, text: str) -> None:
        """Say one thing."""
        self._log(logging.INFO, text)

    def warning(self, text: str) -> None:
        """Say what is odd but does not stop the start."""
        self._log(logging.WARNING, text)

    def error(self, text: str) -> None:
        """Say why it ends."""
        self._log(logging.ERROR, text)

    def _log(self, level: int, text: str) -> None:
        if self._bar is not None:
            self._bar.clear()
        logger.log(level, "%s", " ".join(text.split()))
        if self._bar is not None:
            self._bar.refresh()

    def progress(self, phase: str, done: int, total: int) -> None:
        """Show how far `phase` is, in bytes."""
        if phase != self._phase:
            self.end_progress()
            self._phase = phase
            if self.has_bars:
                self._bar = tqdm(total=total, desc=phase, unit="B", unit_scale=True, leave=True, file=sys.stderr)
        if self._bar is not None:
            self._bar.total = total
            self._bar.update(done - self._bar.n)
            if done >= total:
                self.end_progress()
            return
        share = max(share for share in SHARES if done * 100 >= share * max(total, 1))
        if share > self._last_share:
            self._last_share = share
            logger.info("%s: %d%%", phase, share)

    def end_progress(self) -> None:
        """Leave the bar as it is; the next progress starts a new one."""
        if self._bar is not None:
            self._bar.close()
        self._bar = None
        self._phase = ""
        self._last_share = -1
