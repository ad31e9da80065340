"""A light HTTP load: streams of server-sent events over plain sockets, timed, and read after the clock has stopped.

The client shares the machine's cores with the server, so it does as little as it can while the load runs: it
notes when each event came, and parses the events afterwards.
"""

import asyncio
import json
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from workload import Request

REQUEST_TIMEOUT_S = 300


@dataclass(frozen=True, slots=True)
class Dialect:
    """How a server is asked for a stream of tokens, and how its events are read."""

    path: str
    body: Callable[[Request, int], dict[str, Any]]  # of a request and its number of tokens
    is_token: Callable[[dict[str, Any]], bool]
    count: Callable[[dict[str, Any]], int | None]  # the server's own count, where an event carries one


@dataclass(frozen=True, slots=True)
class Answer:
    """When the tokens of one request came, in seconds after it was sent."""

    token_times: list[float]
    num_tokens: int
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Run:
    """The answers to one load and how long all of it took."""

    answers: list[Answer]
    duration_s: float


@dataclass(slots=True)
class Stream:
    """The raw events of one request."""

    sent_at: float
    events: list[tuple[float, bytes]] = field(default_factory=list)
    error: str | None = None


def run_closed(
    host: str, port: int, dialect: Dialect, requests: list[Request], num_tokens: int, concurrency: int
) -> Run:
    """Keep `concurrency` requests in flight until all are answered."""

    async def run() -> list[Stream]:
        waiting = list(enumerate(requests))[::-1]
        streams: list[Stream] = [Stream(0.0)] * len(requests)

        async def one_after_another() -> None:
            while waiting:
                index, request = waiting.pop()
                streams[index] = await ask(host, port, dialect.path, dialect.body(request, num_tokens))

        await asyncio.gather(*(one_after_another() for _ in range(concurrency)))
        return streams

    return _timed(run, dialect)


def run_open(
    host: str, port: int, dialect: Dialect, requests: list[Request], num_tokens: int, rate: float, seed: int = 0
) -> Run:
    """Send requests at random times, `rate` a second on average (Poisson), whatever is still in flight."""
    chance = random.Random(seed)

    async def run() -> list[Stream]:
        tasks = []
        due = time.perf_counter()
        for request in requests:
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            tasks.append(asyncio.create_task(ask(host, port, dialect.path, dialect.body(request, num_tokens))))
            due += chance.expovariate(rate)
        return await asyncio.gather(*tasks)

    return _timed(run, dialect)


def _timed(run: Callable[[], Any], dialect: Dialect) -> Run:
    started = time.perf_counter()
    streams = asyncio.run(run())
    duration_s = time.perf_counter() - started
    return Run([_read(stream, dialect) for stream in streams], duration_s)


async def ask(host: str, port: int, path: str, body: dict[str, Any]) -> Stream:
    """Send one request and note each event of its answer with its time."""
    payload = json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: application/json\r\n"
        f"Accept: text/event-stream\r\nContent-Length: {len(payload)}\r\nConnection: close\r\n\r\n"
    ).encode()
    stream = Stream(time.perf_counter())
    try:
        async with asyncio.timeout(REQUEST_TIMEOUT_S):
            reader, writer = await asyncio.open_connection(host, port)
            try:
                writer.write(head + payload)
                await _collect(reader, stream)
            finally:
                writer.close()
    except (OSError, EOFError, ValueError, TimeoutError) as error:
        stream.error = f"{type(error).__name__}: {error}"
    return stream


async def _collect(reader: asyncio.StreamReader, stream: Stream) -> None:
    header = await reader.readuntil(b"\r\n\r\n")
    status = header.split(b" ", 2)[1]
    is_chunked = b"transfer-encoding: chunked" in header.lower()
    buffer = b""
    while data := await (_read_chunk(reader) if is_chunked else reader.read(65536)):
        now = time.perf_counter()
        *lines, buffer = (buffer + data).split(b"\n")
        stream.events += [(now, line[5:].strip()) for line in lines if line.startswith(b"data:")]
    if status != b"200":
        stream.error = f"HTTP {status.decode()}: {buffer.decode(errors='replace')[:200]}"


async def _read_chunk(reader: asyncio.StreamReader) -> bytes:
    size = int(await reader.readuntil(b"\r\n"), 16)
    return (await reader.readexactly(size + 2))[:-2]


def _read(stream: Stream, dialect: Dialect) -> Answer:
    times: list[float] = []
    count: int | None = None
    error = stream.error
    for at, data in stream.events:
        if data == b"[DONE]":
            continue
        event = json.loads(data)
        if "error" in event:
            error = str(event["error"])
            continue
        if dialect.is_token(event):
            times.append(at - stream.sent_at)
        count = dialect.count(event) or count
    if not times and error is None:
        error = "the stream ended without a token"
    return Answer(times, count if count is not None else len(times), error)
