"""Bytes on the wire that are no request yet, or never: slow headers, endless headers, too many, odd ones."""

import asyncio
import json
from collections.abc import Awaitable, Callable

import pytest
from scripted_engine import DEADLINE_S, TestServer, api_server

from loraplex_server.api import http_protocol

BODY = b'{"inputs": "hi"}'
HEAD = b"POST /generate HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: %d\r\n" % len(BODY)


def live(test: Callable[[TestServer], Awaitable[None]]) -> None:
    async def run() -> None:
        async with asyncio.timeout(DEADLINE_S), api_server(live=True) as server:
            await test(server)

    asyncio.run(run())


async def connect(server: TestServer) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    host, _, port = server.base_url.removeprefix("http://").partition(":")
    return await asyncio.open_connection(host, int(port))


def parsed(raw: bytes) -> tuple[int, dict[str, str]]:
    head, _, body = raw.partition(b"\r\n\r\n")
    assert b"connection: close" in head.lower()
    return int(head.split()[1]), json.loads(body)


async def send(server: TestServer, *pieces: bytes) -> bytes:
    """All that the server says until it closes."""
    reader, writer = await connect(server)
    for piece in pieces:
        writer.write(piece)
        await writer.drain()
    answer = await reader.read()
    writer.close()
    return answer


def test_headers_that_trickle_are_given_up_and_others_are_served_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_protocol, "HEADER_TIMEOUT_S", 0.5)

    async def test(server: TestServer) -> None:
        reader, writer = await connect(server)
        trickling = asyncio.create_task(trickle(writer))
        assert (await server.generate("hi")).status_code == 200
        status, body = parsed(await reader.read())
        trickling.cancel()
        await asyncio.gather(trickling, return_exceptions=True)
        writer.close()
        assert (status, body["error_type"]) == (408, "timeout") and "0.5 s" in body["error"]
        assert len(server.engine.requests) == 1

    async def trickle(writer: asyncio.StreamWriter) -> None:
        for byte in HEAD + b"x-slow: " + b"a" * 1000:
            writer.write(bytes([byte]))
            await asyncio.sleep(0.02)

    live(test)


def test_a_client_that_goes_on_sending_after_a_refusal_still_reads_it() -> None:
    async def test(server: TestServer) -> None:
        reader, writer = await connect(server)
        writer.write(b"no HTTP\r\n\r\n")
        await writer.drain()
        while not reader._buffer:  # type: ignore[attr-defined]
            await asyncio.sleep(0.01)
        for _ in range(3):
            writer.write(b"a" * 4096)
            await asyncio.sleep(0.01)
        assert parsed(await reader.read())[0] == 400
        writer.close()
        assert (await server.generate("hi")).status_code == 200

    live(test)


def test_500_connections_that_say_nothing_or_little_are_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_protocol, "HEADER_TIMEOUT_S", 1.0)

    async def test(server: TestServer) -> None:
        connections = []
        for number in range(500):
            connections.append(await connect(server))
            if number % 2 == 0:
                connections[-1][1].write(b"POST /gen")
        assert (await server.generate("hi")).status_code == 200
        answers = await asyncio.gather(*(reader.read() for reader, _ in connections))
        assert all(parsed(answer)[0] == 408 for answer in answers[::2])
        assert set(answers[1::2]) == {b""}
        for _, writer in connections:
            writer.close()

    live(test)


def test_a_connection_may_wait_between_its_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_protocol, "HEADER_TIMEOUT_S", 0.3)

    async def test(server: TestServer) -> None:
        reader, writer = await connect(server)
        for _ in range(2):
            writer.write(HEAD + b"\r\n" + BODY)
            head = await reader.readuntil(b"\r\n\r\n")
            assert b" 200 OK" in head
            length = next(line for line in head.split(b"\r\n") if line.lower().startswith(b"content-length"))
            await reader.readexactly(int(length.split()[1]))
            await asyncio.sleep(0.6)
        writer.write(HEAD)
        assert parsed(await reader.read())[0] == 408
        writer.close()

    live(test)


def test_a_header_that_never_ends_is_431() -> None:
    async def test(server: TestServer) -> None:
        status, body = parsed(await send(server, HEAD + b"x-long: ", *(b"a" * 8192 for _ in range(12))))
        assert (status, body["error_type"]) == (431, "headers_too_large")
        assert not server.engine.requests

    live(test)


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ([b"x-%d: a" % i for i in range(97)], 200),
        ([b"x-%d: a" % i for i in range(98)], 431),
        ([b"x-one: " + b"a" * (16 * 1024 - 5)], 200),
        ([b"x-one: " + b"a" * (16 * 1024 - 4)], 431),
        ([b"x-%d: " % i + b"a" * 16_000 for i in range(5)], 431),
    ],
    ids=["100 headers", "101 headers", "a line of 16 KiB", "a longer line", "80 KB"],
)
def test_headers_that_came_whole_have_limits(headers: list[bytes], status: int) -> None:
    async def test(server: TestServer) -> None:
        request = HEAD + b"\r\n".join(headers) + b"\r\n\r\n" + BODY
        reader, writer = await connect(server)
        writer.write(request)
        head = await reader.readuntil(b"\r\n\r\n")
        assert int(head.split()[1]) == status
        if status == 431:
            assert b"connection: close" in head and b"headers_too_large" in await reader.read()
            assert not server.engine.requests
        writer.close()

    live(test)


@pytest.mark.parametrize(
    "request_bytes",
    [b"\x16\x03\x01 no HTTP\r\n\r\n", b"GET\r\n\r\n", b"GET / HTTP/1.1\r\nhost x\r\n\r\n", b"\x00" * 100 + b"\r\n\r\n",
     b"POST /generate HTTP/1.1\r\nhost: x\r\ncontent-length: -5\r\n\r\n"],
)  # fmt: skip
def test_what_is_no_request_is_400_in_json(request_bytes: bytes) -> None:
    async def test(server: TestServer) -> None:
        status, body = parsed(await send(server, request_bytes))
        assert (status, set(body)) == (400, {"error", "error_type"})
        assert (await server.generate("hi")).status_code == 200

    live(test)


def test_2000_idle_connections_leave_room_for_a_request() -> None:
    async def test(server: TestServer) -> None:
        connections = [await connect(server) for _ in range(2000)]
        assert (await server.generate("hi")).status_code == 200
        for _, writer in connections:
            writer.close()

    live(test)
