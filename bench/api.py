"""What the API process costs a token: the real one, before an engine that takes no time for its steps but a set one.

A GPU gives a batch of 128 rows a token each every 5 to 7 ms. Whether the process that speaks HTTP can keep up is
measured here, without a GPU: this program is the engine, and a step of its is a message. Figures are processor time of
the API process, so they hold on a machine that the client shares; the answer's tokens are counted.
"""

import argparse
import asyncio
import json
import multiprocessing
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import psutil
from report import aligned

from loraplex import demo
from loraplex_server.config import ApiConfig, EngineConfig, ServeConfig
from loraplex_server.control import ControlLine
from loraplex_server.link import EngineLink
from loraplex_server.messages import EngineReady, EngineStats, GenerateRequest, StepOutput, TokenOutput

FIRST_TOKEN, NUM_TOKEN_IDS = 300, 40_000  # plain pieces of words in the demo's vocabulary
CHAT = {"messages": [{"role": "user", "content": "Hello"}], "model": "m", "stream": True}
PROMPT = "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
# Name of a load: route, and the body with the number of tokens to be set.
LOADS: dict[str, tuple[str, dict[str, Any], str]] = {
    "/generate_stream": ("/generate_stream", {"inputs": PROMPT, "parameters": {"details": True}}, "max_new_tokens"),
    "/v1/chat/completions, stream": ("/v1/chat/completions", CHAT, "max_tokens"),
    "/v1/completions, stream": ("/v1/completions", {"prompt": PROMPT, "model": "m", "stream": True}, "max_tokens"),
    "/generate": ("/generate", {"inputs": PROMPT, "parameters": {"details": True}}, "max_new_tokens"),
}


@dataclass
class _Row:
    left: int
    token: int


class Engine(threading.Thread):
    """The engine's end of the link: every row that runs gains a token in each step; a step takes `pace` seconds."""

    def __init__(self, folder: str, pace: float) -> None:
        super().__init__(daemon=True)
        self._link, self._pace = EngineLink(folder), pace
        self._rows: dict[str, _Row] = {}

    def run(self) -> None:
        """Say that the engine is ready, then serve until the process ends."""
        self._link.send(
            EngineReady(
                max_input_tokens=1024, max_total_tokens=4096, max_batch_prefill_tokens=2048,
                max_batch_total_tokens=10**6, max_batch_size=256, num_kv_blocks=10**5, block_size=16,
                vocab_size=49152, end_token_ids=[2], dtype="bfloat16", device="cuda", max_loras=4,
            )
        )  # fmt: skip
        while True:
            if not self._rows:
                self._link.wait(1.0)
            began = time.monotonic()
            for message in self._link.receive():
                if isinstance(message, GenerateRequest):
                    self._rows[message.request_id] = _Row(message.sampling.max_new_tokens, len(self._rows))
            if self._rows:
                outputs = [self._output(name, row) for name, row in self._rows.items()]
                self._rows = {name: row for name, row in self._rows.items() if row.left}
                self._link.send(StepOutput(outputs=outputs, stats=EngineStats(num_running=len(self._rows))))
                time.sleep(max(0.0, self._pace - (time.monotonic() - began)))

    @staticmethod
    def _output(name: str, row: _Row) -> TokenOutput:
        row.left -= 1
        row.token = (row.token * 31 + 7) % NUM_TOKEN_IDS
        return TokenOutput(
            request_id=name,
            token_ids=[FIRST_TOKEN + row.token],
            logprobs=[-0.5],
            finish_reason=None if row.left else "length",
        )


class _Client(asyncio.Protocol):
    """One request; `done` says whether its answer had all tokens, by the reason for its end."""

    def __init__(self, request: bytes, done: asyncio.Future[bool]) -> None:
        self._request, self._done, self._tail, self._is_whole = request, done, b"", False

    def connection_made(self, transport: Any) -> None:
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        recent = self._tail + data
        self._is_whole = self._is_whole or b'"length"' in recent
        self._tail = recent[-8:]

    def connection_lost(self, _: Exception | None) -> None:
        if not self._done.done():
            self._done.set_result(self._is_whole)


def _ask(port: int, path: str, body: dict[str, Any], num_streams: int, results: Any) -> None:
    """In a process of its own: all requests at once; puts the seconds, and how many answers are whole."""
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-type: application/json\r\n"
    request = f"{head}content-length: {len(data)}\r\n\r\n".encode() + data

    async def run() -> tuple[float, int]:
        loop, began = asyncio.get_running_loop(), time.monotonic()
        answers = [loop.create_future() for _ in range(num_streams)]
        for answer in answers:
            await loop.create_connection(lambda answer=answer: _Client(request, answer), "127.0.0.1", port)
        num_whole = sum(await asyncio.gather(*answers))
        return time.monotonic() - began, num_whole

    results.put(asyncio.run(run()))


def measure(api: psutil.Process, port: int, load: str, num_streams: int, num_tokens: int, rounds: int) -> list[str]:
    """Tokens a second that were carried, and the API process's share of it: a row of the table."""
    path, body, field = LOADS[load]
    holder = body.get("parameters", body)
    holder[field] = num_tokens
    speeds, costs = [], []
    context = multiprocessing.get_context("spawn")
    for _ in range(rounds + 1):
        before, results = api.cpu_times(), context.Queue()
        client = context.Process(target=_ask, args=(port, path, body, num_streams, results))
        client.start()
        seconds, num_whole = results.get(timeout=300)
        client.join()
        if num_whole < num_streams:
            raise RuntimeError(f"{load}: {num_streams - num_whole} of {num_streams} answers lack tokens")
        after = api.cpu_times()
        speeds.append(num_streams * num_tokens / seconds)
        costs.append((after.user + after.system - before.user - before.system) / (num_streams * num_tokens))
    # The first round is for the caches.
    cost = statistics.median(costs[1:])
    return [load, f"{statistics.median(speeds[1:]):.0f}", f"{cost * 1e6:.1f}", f"{1 / cost:.0f}"]


def main() -> None:
    """Start the API process, be its engine, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--streams", type=int, default=128, help="answers at a time")
    parser.add_argument("--tokens", type=int, default=256, help="tokens of an answer")
    parser.add_argument("--step-ms", type=float, default=6.5, help="milliseconds of a step; 0: as fast as it goes")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--load", choices=LOADS, action="append", help="only these; repeatable")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = int(free.getsockname()[1])
        free.close()
        config = ServeConfig(
            api=ApiConfig(
                hostname="127.0.0.1",
                port=port,
                model_id="m",
                max_concurrent_requests=options.streams,
                log_level="warn",
            ),
            engine=EngineConfig(model_path=str(demo.prepare())),
            link_address=folder,
        )
        Path(folder, "config.json").write_bytes(msgspec.json.encode(config))
        ours, theirs = socket.socketpair()
        control = ControlLine(ours)
        command = [sys.executable, "-m", "loraplex.processes", "api", "--config", f"{folder}/config.json"]
        process = subprocess.Popen([*command, "--control", str(theirs.fileno())], pass_fds=[theirs.fileno()])
        theirs.close()
        try:
            Engine(folder, options.step_ms / 1e3).start()
            while not any(message["event"] == "ready" for message in control.receive()):
                if process.poll() is not None:
                    raise RuntimeError(f"the API process ended with exit code {process.returncode}")
                time.sleep(0.1)
            rows = [["load", "tok/s carried", "API us a token", "tok/s of one core"]]
            for load in options.load or LOADS:
                rows.append(
                    measure(psutil.Process(process.pid), port, load, options.streams, options.tokens, options.rounds)
                )
            print(aligned(rows))
            if options.step_ms:
                print(f"the engine gave {options.streams / options.step_ms * 1e3:.0f} tok/s; {os.cpu_count()} cores")
        finally:
            process.terminate()
            process.wait()


if __name__ == "__main__":
    main()
