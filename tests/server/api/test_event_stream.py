"""Server-sent events below the routes: keep-alive, a reader that stalls, a body that never comes."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest
import uvicorn
from scripted_engine import DEADLINE_S, ScriptedEngine, api_server, transport_to
from starlette.requests import Request
from starlette.types import Receive, Scope, Send
from uvicorn.server import ServerState

from loraplex_server.api import body as body_module
from loraplex_server.api import http_protocol, sse
from loraplex_server.api.body import read_body
from loraplex_server.api.http_protocol import HttpProtocol
from loraplex_server.api.schemas.tgi import GenerateBody
from loraplex_server.errors import BodyTimeout, InvalidBody

SCOPE = {"type": "http", "method": "POST", "path": "/", "headers": [(b"content-type", b"application/json")]}


async def never() -> Any:
    await asyncio.Event().wait()


def test_an_event_is_one_line_whatever_its_text_holds() -> None:
    class Piece(msgspec.Struct):
        text: str

    assert sse.event(Piece('a\nb\r"\u2028é')) == 'data: {"text":"a\\nb\\r\\"\u2028é"}\n\n'.encode()


def test_an_idle_stream_is_kept_alive_by_comments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "KEEP_ALIVE_S", 0.01)

    async def run() -> None:
        engine = ScriptedEngine(gate=asyncio.Event(), gate_at=1)
        async with asyncio.timeout(DEADLINE_S), api_server(engine, live=True) as server:
            request = server.http.stream("POST", "/generate_stream", json={"inputs": "hi"})
            async with request as response:
                received = b""
                async for chunk in response.aiter_raw():
                    received += chunk
                    if b"data: " in received and received.endswith(b"\n\n:\n\n"):
                        engine.gate.set()
            assert engine.gate.is_set()
            assert b'"generated_text":"hello world"' in received

    asyncio.run(run())


def test_a_reader_that_stalls_is_cut_off_which_ends_what_feeds_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_protocol, "STALLED_READER_S", 0.05)

    async def run() -> None:
        closed = asyncio.Event()

        async def events() -> AsyncIterator[bytes]:
            try:
                while True:
                    await asyncio.sleep(0)
                    yield b"data: " + b"x" * 2**16 + b"\n\n"
            finally:
                closed.set()

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            await sse.EventStream(events(), {})(scope, receive, send)

        async with asyncio.timeout(DEADLINE_S), transport_to(app, live=True) as (_, base_url):
            reader, writer = await asyncio.open_connection("127.0.0.1", int(base_url.rpartition(":")[2]), limit=1)
            writer.write(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
            await closed.wait()
            with contextlib.suppress(ConnectionResetError):
                while await reader.read(2**20):
                    pass
            writer.close()

    asyncio.run(run())


def test_a_reader_that_goes_on_in_time_is_not_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        async def app(scope: Scope, receive: Receive, send: Send) -> None: ...

        protocol = HttpProtocol(uvicorn.Config(app, lifespan="off"), ServerState(), {})
        transport = Transport()
        protocol.connection_made(transport)
        monkeypatch.setattr(http_protocol, "STALLED_READER_S", 0.0)
        protocol.pause_writing()
        protocol.resume_writing()
        await asyncio.sleep(0.01)
        assert not transport.is_aborted
        protocol.pause_writing()
        await asyncio.sleep(0.01)
        assert transport.is_aborted
        protocol.connection_lost(None)

    asyncio.run(run())


class Transport(asyncio.Transport):
    """Nobody reads at the other end."""

    is_aborted = False

    def abort(self) -> None:
        self.is_aborted = True

    def close(self) -> None: ...

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return default


def test_a_body_that_does_not_come_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(body_module, "BODY_TIMEOUT_S", 0.01)
    with pytest.raises(BodyTimeout):
        asyncio.run(read_body(Request(SCOPE, never), GenerateBody))


def test_a_body_that_is_cut_is_no_json() -> None:
    messages = iter([{"type": "http.request", "body": b'{"inp', "more_body": True}, {"type": "http.disconnect"}])

    async def receive() -> Any:
        return next(messages)

    with pytest.raises(InvalidBody):
        asyncio.run(read_body(Request(SCOPE, receive), GenerateBody))
