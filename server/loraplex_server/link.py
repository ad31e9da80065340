"""The link between the API process and engine rank 0: two ZeroMQ pipes over sockets in a private folder."""

import asyncio
from collections import deque
from pathlib import Path

import zmq

from loraplex_server.messages import FromEngine, ToEngine, decode_from_engine, decode_to_engine, encode

# A bound on what may pile up when the other side stands still; at 128 concurrent requests it is never met.
HIGH_WATER_MARK = 100_000
# How soon a message that could not be handed over is tried again.
RETRY_S = 0.01


def _address(folder: str, name: str) -> str:
    return f"ipc://{Path(folder) / name}"


class ApiLink:
    """The API process's end, for an event loop that runs; binds both pipes, so it may be there before the engine.

    The loop watches the pipe's descriptor itself: pyzmq's own asyncio sockets take several times as long a message,
    which on a small machine is time taken from the model.
    """

    def __init__(self, folder: str):
        self._context = zmq.Context()
        self._to_engine = self._context.socket(zmq.PUSH)
        self._from_engine = self._context.socket(zmq.PULL)
        for socket, name in ((self._to_engine, "to_engine"), (self._from_engine, "from_engine")):
            socket.set_hwm(HIGH_WATER_MARK)
            socket.setsockopt(zmq.LINGER, 0)
            socket.bind(_address(folder, name))
        self._num_engines_lost = 0
        self._arrived: deque[bytes] = deque()
        self._readable = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._descriptor = int(self._from_engine.getsockopt(zmq.FD))
        self._loop.add_reader(self._descriptor, self._readable.set)

    async def send(self, message: ToEngine) -> None:
        """Hand one message over; waits while no engine is connected, or it has stood still for very long.

        When the engine is lost meanwhile, the message is dropped: it was not meant for the next one.
        """
        data = encode(message)
        num_engines_lost = self._num_engines_lost
        while num_engines_lost == self._num_engines_lost:
            try:
                self._to_engine.send(data, zmq.NOBLOCK)
                return
            except zmq.Again:
                await asyncio.sleep(RETRY_S)

    def engine_lost(self) -> None:
        """The engine is gone, and another may come in its place: forget what the first had still said."""
        self._num_engines_lost += 1
        self._take_all()
        self._arrived.clear()

    async def receive(self) -> FromEngine:
        """Wait for the engine's next message."""
        while not self._arrived:
            self._readable.clear()
            # The descriptor tells of news only once, so all that is there is taken before waiting again.
            self._take_all()
            if not self._arrived:
                await self._readable.wait()
        message: FromEngine = decode_from_engine(self._arrived.popleft())
        return message

    def close(self) -> None:
        """Close both pipes; what was not sent is dropped."""
        self._loop.remove_reader(self._descriptor)
        self._context.destroy(linger=0)

    def _take_all(self) -> None:
        while True:
            try:
                self._arrived.append(self._from_engine.recv(zmq.NOBLOCK))
            except zmq.Again:
                return


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
