"""EngineClient: the API process's view of the engine, one stream of outputs a request."""

import asyncio
import logging
from collections import deque
from collections.abc import AsyncGenerator, Callable
from typing import Protocol

from loraplex_server.adapter_contents import AdapterMessage
from loraplex_server.errors import GenerationFailed, LoraplexError
from loraplex_server.messages import (
    AbortRequest,
    AdapterStatus,
    EngineReady,
    EngineStats,
    FromEngine,
    GenerateRequest,
    StepOutput,
    ToEngine,
    TokenOutput,
)

logger = logging.getLogger("loraplex.api")

# Outputs that may wait for one reader. A reader that is this far behind has stopped reading.
MAX_WAITING_OUTPUTS = 1_000


class Link(Protocol):
    """The API's end of the link."""

    async def send(self, message: ToEngine) -> None:
        """Hand one message over."""

    async def receive(self) -> FromEngine:
        """Wait for the engine's next message."""

    def engine_lost(self) -> None:
        """Drop the message that waits to be handed over."""


class _Reply:
    """The outputs of one request that its reader has not taken yet."""

    __slots__ = ("error", "outputs", "wakeup")

    def __init__(self) -> None:
        self.outputs: deque[TokenOutput] = deque()
        self.error: LoraplexError | None = None
        self.wakeup: asyncio.Future[None] | None = None

    def wake(self) -> None:
        if self.wakeup is not None and not self.wakeup.done():
            self.wakeup.set_result(None)

    async def wait(self) -> None:
        if not self.outputs and self.error is None:
            self.wakeup = asyncio.get_running_loop().create_future()
            await self.wakeup


class EngineClient:
    """Sends requests to the engine and gives each one its own outputs.

    `run` carries the messages; it ends when it is cancelled. Only the event loop's thread may use a client.
    """

    def __init__(
        self, link: Link, on_stats: Callable[[EngineStats], None], on_adapter: Callable[[AdapterStatus], None]
    ):
        self._link = link
        self._on_stats = on_stats
        self._on_adapter = on_adapter
        self._outbox: asyncio.Queue[ToEngine] = asyncio.Queue()
        self._replies: dict[str, _Reply] = {}
        self._lost: LoraplexError | None = None
        self._greeting: Callable[[], list[AdapterMessage]] | None = None  # for the engine that takes a lost one's place
        self._ready: asyncio.Future[EngineReady] = asyncio.get_running_loop().create_future()

    async def run(self) -> None:
        """Carry messages both ways."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._send_all())
            tasks.create_task(self._receive_all())

    async def ready(self) -> EngineReady:
        """Wait until the engine can serve."""
        return await asyncio.shield(self._ready)

    def tell(self, message: AdapterMessage) -> None:
        """Tell the engine something that has no answer; it learns of it before any request that is submitted later.

        While an engine is lost nobody is told: the next one's greeting says it all.
        """
        if self._lost is None:
            self._outbox.put_nowait(message)

    async def submit(self, request: GenerateRequest) -> AsyncGenerator[list[TokenOutput], None]:
        """Send a request and yield its outputs, all that wait at a time, up to the finish reason.

        A reader that leaves early (or is cancelled) takes its request off the engine.
        """
        if self._lost is not None:
            raise self._lost
        reply = _Reply()
        self._replies[request.request_id] = reply
        self._outbox.put_nowait(request)
        is_finished = False
        try:
            while not is_finished:
                await reply.wait()
                if reply.outputs:
                    outputs = list(reply.outputs)
                    reply.outputs.clear()
                    is_finished = outputs[-1].finish_reason is not None
                    yield outputs
                elif reply.error is not None:
                    is_finished = True
                    raise reply.error
        finally:
            self._replies.pop(request.request_id, None)
            if not is_finished:
                self._outbox.put_nowait(AbortRequest(request_id=request.request_id))

    def fail_all(self, error: LoraplexError) -> None:
        """End every request in flight, and every later one, with `error`; the engine is gone or going."""
        self._lost = error
        for reply in self._replies.values():
            reply.error = error
            reply.wake()

    def engine_lost(self, error: LoraplexError, greeting: Callable[[], list[AdapterMessage]]) -> None:
        """The engine is gone and another will take its place: until that is ready, every request ends with `error`.

        `greeting` is asked when the other one is ready, for what it must know before the first request. Not earlier:
        the pipe to the lost engine may still take messages, which then nobody reads.
        """
        self.fail_all(error)
        self._greeting = greeting
        while not self._outbox.empty():
            self._outbox.get_nowait()
        self._link.engine_lost()
        if self._ready.done():
            self._ready = asyncio.get_running_loop().create_future()

    @property
    def has_sent_all(self) -> bool:
        """Whether everything was handed to the link."""
        return self._outbox.empty()

    @property
    def num_in_flight(self) -> int:
        """Requests that the engine has not finished."""
        return len(self._replies)

    async def _send_all(self) -> None:
        while True:
            await self._link.send(await self._outbox.get())

    async def _receive_all(self) -> None:
        while True:
            match await self._link.receive():
                case StepOutput(outputs=outputs, stats=stats):
                    for output in outputs:
                        self._deliver(output)
                    if stats is not None:
                        self._on_stats(stats)
                case EngineReady() as ready:
                    self._engine_ready(ready)
                case AdapterStatus() as status:
                    if status.error is not None:
                        logger.warning("adapter %r could not be loaded: %s", status.adapter_id, status.error)
                    self._on_adapter(status)

    def _engine_ready(self, ready: EngineReady) -> None:
        if self._ready.done():
            return
        self._lost = None
        if self._greeting is not None:
            for message in self._greeting():
                self.tell(message)
            self._greeting = None
        self._ready.set_result(ready)

    def _deliver(self, output: TokenOutput) -> None:
        reply = self._replies.get(output.request_id)
        if reply is None or reply.error is not None:
            return  # aborted: the engine had not heard of it yet
        reply.outputs.append(output)
        if len(reply.outputs) > MAX_WAITING_OUTPUTS:
            reply.outputs.clear()
            reply.error = GenerationFailed(
                f"the client has not read for {MAX_WAITING_OUTPUTS} tokens; the request was cancelled"
            )
            self._outbox.put_nowait(AbortRequest(request_id=output.request_id))
        reply.wake()
