"""The engine's sign of life: a thread answers the supervisor's pings, however long a step takes, and says how long."""

import contextlib
import os
import select
import threading
import time
from collections.abc import Iterator
from typing import Any

from loraplex_server.control import ControlLine


class Heartbeat:
    """Takes over the control line. `is_over` turns true when the supervisor has said stop or is gone."""

    def __init__(self, control: ControlLine):
        self._control = control
        self._at_work_since: float | None = None
        self._news, self._teller = os.pipe()
        self._end, self._ender = os.pipe()
        self.is_over = False
        self._thread = threading.Thread(target=self._answer, name="heartbeat", daemon=True)
        self._thread.start()

    def fileno(self) -> int:
        """A descriptor that becomes readable when `is_over` turns true, for a poller."""
        return self._news

    @property
    def lost_supervisor(self) -> bool:
        """Whether the supervisor is gone."""
        return self._control.is_closed

    def send(self, event: str, **fields: Any) -> None:
        """Say one thing to the supervisor."""
        self._control.send(event, **fields)

    @contextlib.contextmanager
    def at_work(self) -> Iterator[None]:
        """Within, the answers say for how long this has been going on."""
        self._at_work_since = time.monotonic()
        try:
            yield
        finally:
            self._at_work_since = None

    def close(self) -> None:
        """End the thread."""
        os.write(self._ender, b".")
        self._thread.join()
        for descriptor in (self._news, self._teller, self._end, self._ender):
            os.close(descriptor)

    def _answer(self) -> None:
        poller = select.poll()
        poller.register(self._control.fileno(), select.POLLIN)
        poller.register(self._end, select.POLLIN)
        while not any(descriptor == self._end for descriptor, _ in poller.poll()):
            for event in self._control.receive():
                if event["event"] == "ping":
                    since = self._at_work_since
                    self._control.send("pong", at_work_s=0.0 if since is None else time.monotonic() - since)
                elif event["event"] == "stop":
                    self._tell()
            if self._control.is_closed:
                self._tell()
                return

    def _tell(self) -> None:
        if not self.is_over:
            self.is_over = True
            os.write(self._teller, b".")
