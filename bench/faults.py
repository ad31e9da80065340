"""What faulty clients cost: memory for bodies and headers without end, others' latency beside slow headers, and idle
connections by the thousand.

Each row prints its figures and what is wanted of them; it ends with 1 when one is not met. The client shares the
machine with the server: run it on an otherwise idle one.
"""

import argparse
import asyncio
import contextlib
import resource
import sys
import tempfile
import threading
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

import peers
import psutil
from tiny_world import make_model

MIB = 2**20
PAYLOAD_LIMIT = 2_000_000
BODY = b'{"inputs": "hello", "parameters": {"max_new_tokens": 8, "ignore_eos_token": true}}'
REQUEST = (
    b"POST /generate HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(BODY)
    + BODY
)
NUM_ROUNDS = 5  # of normal traffic, beside the fault and without it in turn
ROUND_S = 3.0
NUM_CLIENTS = 4


@dataclass
class Findings:
    """What the rows have found out."""

    missed: list[str] = field(default_factory=list)

    def row(self, text: str, *, is_met: bool) -> None:
        """Print a row."""
        print(f"{'   ' if is_met else 'NOT'} {text}", flush=True)
        if not is_met:
            self.missed.append(text)


class Server:
    """The server under test: its address, and the memory of its API process."""

    def __init__(self, target: peers.HttpTarget):
        self.host, self.port = target.host, target.port
        assert target.process is not None
        children = psutil.Process(target.process.popen.pid).children(recursive=True)
        [self._api] = [child for child in children if {"loraplex.processes", "api"} <= {*child.cmdline()}]

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A connection of its own."""
        return await asyncio.open_connection(self.host, self.port)

    @property
    def memory(self) -> int:
        """Bytes that belong to the API process alone."""
        found = self._api.memory_info()
        return int(found.rss - found.shared)

    @property
    def num_files(self) -> int:
        """Files that the API process has open."""
        return int(self._api.num_fds())


class Peak:
    """The highest memory of the API process while the block lasts."""

    def __init__(self, server: Server):
        self._server = server
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> "Peak":
        self.before = self.highest = self._server.memory
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._is_over.wait(0.005):
            self.highest = max(self.highest, self._server.memory)

    @property
    def growth(self) -> int:
        """By how much it rose above where it began."""
        return self.highest - self.before


async def answered(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bytes:
    """One request on a connection that stays open; the status line of its answer."""
    writer.write(REQUEST)
    head = await reader.readuntil(b"\r\n\r\n")
    length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r")[0])
    await reader.readexactly(length)
    return head.partition(b"\r")[0]


async def traffic(server: Server, seconds: float) -> list[float]:
    """Normal requests of a few clients; the time that each took. Fails when one is not answered."""
    latencies: list[float] = []
    until = time.perf_counter() + seconds

    async def client() -> None:
        reader, writer = await server.connect()
        while time.perf_counter() < until:
            began = time.perf_counter()
            status = await answered(reader, writer)
            assert status == b"HTTP/1.1 200 OK", status
            latencies.append(time.perf_counter() - began)
        writer.close()

    await asyncio.gather(*(client() for _ in range(NUM_CLIENTS)))
    return latencies


def p99(latencies: list[float]) -> float:
    """The latency that one in a hundred exceeds, in ms."""
    return sorted(latencies)[int(0.99 * len(latencies))] * 1e3


async def send_on(writer: asyncio.StreamWriter, piece: bytes, most: int) -> int:
    """Send a piece again and again until the server cuts the connection; the bytes that were sent."""
    sent = 0
    with contextlib.suppress(ConnectionError):
        while sent < most:
            writer.write(piece)
            await writer.drain()
            sent += len(piece)
    return sent


async def too_large_bodies(server: Server, findings: Findings) -> None:
    """F-HTTP-04: bodies far above the limit, announced and endless."""
    chunk = b"%x\r\n%b\r\n" % (65_536, b"a" * 65_536)
    announced = (
        b"POST /generate HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 1000000000\r\n\r\n"
    )
    endless = announced.replace(b"content-length: 1000000000", b"transfer-encoding: chunked")
    for what, head, piece in (("announced", announced, b"a" * 65_536), ("endless, in chunks", endless, chunk)):
        with Peak(server) as peak:
            reader, writer = await server.connect()
            writer.write(head)
            sent = await send_on(writer, piece, 200_000_000)
            with contextlib.suppress(ConnectionError):
                await reader.read(64)
            writer.close()
        text = (
            f"F-HTTP-04 a body above the limit, {what}: cut after {sent / 1e6:.1f} MB; API process "
            f"+{peak.growth / 1e6:.1f} MB (wanted: up to {2 * PAYLOAD_LIMIT / 1e6:.0f} MB)"
        )
        findings.row(text, is_met=peak.growth <= 2 * PAYLOAD_LIMIT and sent < 200_000_000)


async def endless_headers(server: Server, findings: Findings) -> None:
    """F-HTTP-06: a header that never ends."""
    with Peak(server) as peak:
        _, writer = await server.connect()
        writer.write(b"POST /generate HTTP/1.1\r\nhost: x\r\nx-long: ")
        sent = await send_on(writer, b"a" * 8192, 50_000_000)
        writer.close()
    text = f"F-HTTP-06 a header without end: cut after {sent / 1e6:.2f} MB; API process +{peak.growth / 1e6:.1f} MB"
    findings.row(text + " (wanted: up to 1 MB)", is_met=peak.growth <= 1e6 and sent < 50_000_000)


async def slow_headers(server: Server, findings: Findings, num_sockets: int) -> None:
    """F-HTTP-05: many clients that send a byte of their headers a second."""
    num_closed = 0

    async def trickle() -> None:
        nonlocal num_closed
        reader, writer = await server.connect()
        writer.write(b"POST /generate HTTP/1.1\r\n")
        ended = asyncio.create_task(reader.read())
        while not ended.done():
            writer.write(b"x")
            await asyncio.wait([ended], timeout=1)
        num_closed += ended.exception() is None and ended.result().startswith(b"HTTP/1.1 408")
        writer.close()

    async def beside() -> list[float]:
        trickling = asyncio.gather(*(trickle() for _ in range(num_sockets)))
        await asyncio.sleep(1)
        latencies = await traffic(server, ROUND_S)
        await trickling
        return latencies

    alone: list[float] = []
    together: list[float] = []
    for _ in range(NUM_ROUNDS):
        alone += await traffic(server, ROUND_S)
        together += await beside()
    total = NUM_ROUNDS * num_sockets
    text = f"F-HTTP-05 {num_sockets} clients with a header byte a second: {num_closed} of {total} closed with 408"
    findings.row(text, is_met=num_closed == total)
    ratio = p99(together) / p99(alone)
    text = f"          p99 of {len(together)} requests {p99(together):.1f} ms, alone {p99(alone):.1f} ms: {ratio:.2f}"
    findings.row(f"{text} (wanted: up to 1.10)", is_met=ratio <= 1.1)


async def idle_connections(server: Server, findings: Findings, wanted: int) -> None:
    """F-HTTP-13: very many connections that have asked once and stay open."""
    alone = await traffic(server, ROUND_S)
    await asyncio.sleep(1)  # until the server has seen that those connections are closed
    before, files = server.memory, server.num_files
    connections = []
    for first in range(0, wanted, 200):  # the system's queue of new connections is not longer than a few thousand
        some = await asyncio.gather(*(server.connect() for _ in range(min(200, wanted - first))))
        connections += some
        for _, writer in some:
            writer.write(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
        for reader, _ in some:
            await reader.readuntil(b"\r\n\r\n")
    taken = (server.memory - before) / max(1, len(connections))
    beside = await traffic(server, ROUND_S)
    await asyncio.sleep(1)
    held = server.num_files - files
    text = f"F-HTTP-13 {held} of {wanted} idle connections held, {taken / 1024:.1f} KiB each"
    findings.row(text, is_met=held >= wanted)
    text = f"          {len(beside)} requests served meanwhile, p99 {p99(beside):.1f} ms, before {p99(alone):.1f} ms"
    findings.row(f"{text} (no figure is wanted)", is_met=True)
    began = time.perf_counter()
    ends = asyncio.gather(*(reader.read() for reader, _ in connections), return_exceptions=True)
    try:
        await asyncio.wait_for(ends, 120)
        text = f"          all closed by the server within {time.perf_counter() - began:.0f} s"
        findings.row(text, is_met=True)
    except TimeoutError:
        findings.row("          some are open after 120 s", is_met=False)
    for _, writer in connections:
        writer.close()


async def run(server: Server, findings: Findings, options: argparse.Namespace) -> None:
    """All rows, one after the other."""
    await traffic(server, 2.0)  # so that nothing is loaded or compiled for the first time later
    rows: list[Callable[[], Awaitable[None]]] = [
        lambda: too_large_bodies(server, findings),
        lambda: endless_headers(server, findings),
        lambda: slow_headers(server, findings, options.slow),
        lambda: idle_connections(server, findings, options.idle),
    ]
    for row in rows:
        await row()


def main() -> int:
    """Start the server, print the rows, and say what is not met."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slow", type=int, default=500, help="clients that never finish their headers")
    parser.add_argument("--idle", type=int, default=10_000, help="idle connections")
    options = parser.parse_args()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = options.idle + 512
    if hard != resource.RLIM_INFINITY and hard < needed:
        parser.error(f"{options.idle} connections need {needed} open files, {hard} are allowed: raise ulimit -Hn")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, needed), hard))
    findings = Findings()
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text).resolve()
        make_model(folder / "base")
        flags = ["--dtype", "float32", "--num-threads", "1", "--num-kv-blocks", "512", "--log-level", "warn"]
        target = peers.loraplex(str(folder / "base"), {}, [*flags, "--payload-limit", str(PAYLOAD_LIMIT)])
        try:
            target.wait_until_ready()
            asyncio.run(run(Server(target), findings, options))
        finally:
            target.stop()
    print("all as wanted" if not findings.missed else f"{len(findings.missed)} not as wanted")
    return 1 if findings.missed else 0


if __name__ == "__main__":
    sys.exit(main())
