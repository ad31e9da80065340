"""The link between the API process and engine rank 0: two ZeroMQ pipes over sockets in a private folder."""

from pathlib import Path

import zmq
import zmq.asyncio

from loraplex_server.messages import FromEngine, ToEngine, decode_from_engine, decode_to_engine, encode

# A bound on what may pile up when the other side stands still; at 128 concurrent requests it is never met.
HIGH_WATER_MARK = 100_000


def _address(folder: str, name: str) -> str:
    return f"ipc://{Path(folder) / name}"


class ApiLink:
    """The API process's end; binds both pipes, so it may be there before the engine."""

    def __init__(self, folder: str):
        self._context = zmq.asyncio.Context()
        self._to_engine = self._context.socket(zmq.PUSH)
        self._from_engine = self._context.socket(zmq.PULL)
        for socket, name in ((self._to_engine, "to_engine"), (self._from_engine, "from_engine")):
            socket.set_hwm(HIGH_WATER_MARK)
            socket.setsockopt(zmq.LINGER, 0)
            socket.bind(_address(folder, name))

    async def send(self, message: ToEngine) -> None:
        """Hand one message over; waits only when the engine has stood still for very long."""
        await self._to_engine.send(encode(message))

    async def receive(self) -> FromEngine:
        """Wait for the engine's next message."""
        message: FromEngine = decode_from_engine(await self._from_engine.recv())
        return message

    def close(self) -> None:
        """Close both pipes; what was not sent is dropped."""
        self._context.destroy(linger=0)


class EngineLink:
    """The engine's end: polled between steps."""

    def __init__(self, folder: str):
        self._context = zmq.Context()
        self._to_engine = self._context.socket(zmq.PULL)
        self._from_engine = self._context.socket(zmq.PUSH)
        for socket, name in ((self._to_engine, "to_engine"), (self._from_engine, "from_engine")):
            socket.set_hwm(HIGH_WATER_MARK)
            socket.setsockopt(zmq.LINGER, 0)
            socket.connect(_address(folder, name))
        self._poller = zmq.Poller()
        self._poller.register(self._to_engine, zmq.POLLIN)

    def watch(self, fd: int) -> None:
        """Let `wait` also end when `fd` becomes readable."""
        self._poller.register(fd, zmq.POLLIN)

    def wait(self, timeout_s: float) -> None:
        """Sleep until something arrives, or `timeout_s` has passed."""
        self._poller.poll(int(timeout_s * 1000))

    def receive(self) -> list[ToEngine]:
        """Everything that has arrived, oldest first; never waits."""
        messages: list[ToEngine] = []
        while True:
            try:
                messages.append(decode_to_engine(self._to_engine.recv(zmq.NOBLOCK)))
            except zmq.Again:
                return messages

    def send(self, message: FromEngine) -> None:
        """Hand one message over."""
        self._from_engine.send(encode(message))

    def close(self) -> None:
        """Close both pipes; what was not sent is dropped."""
        self._context.destroy(linger=0)
