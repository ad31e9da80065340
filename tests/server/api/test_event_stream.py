"""Server-sent events below the routes: keep-alive, a reader that stalls, a body that never comes."""

import asyncio
from collections.abc import AsyncIterator, MutableMapping
from typing import Any

import msgspec
import pytest
from scripted_engine import DEADLINE_S, ScriptedEngine, api_server
from starlette.requests import Request

from loraplex_server.api import body as body_module
from loraplex_server.api import sse
from loraplex_server.api.body import read_body
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


def test_a_reader_that_stalls_ends_the_stream_and_what_feeds_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "STALLED_READER_S", 0.01)
    is_closed = False

    async def events() -> AsyncIterator[bytes]:
        nonlocal is_closed
        try:
            while True:
                yield b"data: x\n\n"
        finally:
            is_closed = True

    async def send(message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.body":
            await never()

    async def run() -> None:
        async with asyncio.timeout(DEADLINE_S):
            await sse.EventStream(events(), {})(SCOPE, never, send)

    asyncio.run(run())
    assert is_closed


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
