"""The line between the supervisor and each process it starts: JSON lines over an inherited socket.

The child says `progress`, `ready`, `failed`, or `ranks_lost` when it ends only because other ranks have. The
supervisor says `ping`, which is answered with `pong`; `stop`, which follows a SIGTERM and only wakes a child that waits
on its line; and to the API process `engine_lost`, or `engine_restarts` when another engine will take its place. The end
of the stream means that the other side is gone.
"""

import json
import select
import socket
import threading
from typing import Any


class ControlLine:
    """One end of the line; never blocks on reading. Any thread may send, one thread may receive."""

    def __init__(self, connection: socket.socket):
        connection.setblocking(False)
        self._connection = connection
        self._sending = threading.Lock()
        self._buffer = b""
        self.is_closed = False

    @classmethod
    def from_fd(cls, fd: int) -> "ControlLine":
        """Take over the inherited file descriptor."""
        return cls(socket.socket(fileno=fd))

    def fileno(self) -> int:
        """The descriptor, for a poller."""
        return self._connection.fileno()

    def send(self, event: str, **fields: Any) -> None:
        """Say one thing; nothing happens when the other side is gone."""
        rest = memoryview(json.dumps({"event": event, **fields}).encode() + b"\n")
        with self._sending:
            try:
                while rest:
                    select.select((), (self._connection,), ())
                    rest = rest[self._connection.send(rest) :]
            except OSError:
                self.is_closed = True

    def receive(self) -> list[dict[str, Any]]:
        """Everything said since the last call; `is_closed` turns true when the other side is gone."""
        while not self.is_closed:
            try:
                data = self._connection.recv(65536)
            except BlockingIOError:
                break
            except OSError:
                data = b""
            if not data:
                self.is_closed = True
                break
            self._buffer += data
        *lines, self._buffer = self._buffer.split(b"\n")
        return [json.loads(line) for line in lines]

    def close(self) -> None:
        """Close this end."""
        self._connection.close()
