"""How real processes start, end and fail: in order, in one line, and with a last word to every client."""

import asyncio
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from demo_server import LaunchedServer, environment, free_port, is_alive, wait_until

# The contract allows 5 s; a shared machine may take many times that.
LOSS_S = 60
HANG_S = 300
ADAPTERS = (None, "good", "other")

pytestmark = pytest.mark.slow
Launch = Callable[..., LaunchedServer]


def body(adapter_id: str | None, max_new_tokens: int) -> dict[str, Any]:
    parameters = {"adapter_id": adapter_id, "max_new_tokens": max_new_tokens, "ignore_eos_token": True}
    return {"inputs": "once upon a time", "parameters": parameters | {"details": True}}


class Stream:
    """A client that reads its stream to the end, whatever that is."""

    def __init__(self) -> None:
        self.has_begun = asyncio.Event()
        self.events: list[dict[str, Any]] = []

    async def read(self, client: httpx.AsyncClient, adapter_id: str | None, max_new_tokens: int) -> None:
        async with client.stream("POST", "/generate_stream", json=body(adapter_id, max_new_tokens)) as response:
            async for line in response.aiter_lines():
                if line.startswith("data:"):
                    self.events.append(json.loads(line.removeprefix("data:")))
                    self.has_begun.set()


@asynccontextmanager
async def streaming(
    server: LaunchedServer, count: int, max_new_tokens: int
) -> AsyncIterator[tuple[httpx.AsyncClient, list[Stream], Awaitable[Any]]]:
    """Clients whose streams have begun, and what to await for their ends; one that hangs fails the test."""
    async with asyncio.timeout(HANG_S), httpx.AsyncClient(base_url=server.url, timeout=HANG_S) as client:
        streams = [Stream() for _ in range(count)]
        reads = [
            asyncio.create_task(stream.read(client, ADAPTERS[number % 3], max_new_tokens))
            for number, stream in enumerate(streams)
        ]
        for stream in streams:
            await stream.has_begun.wait()
        yield client, streams, asyncio.gather(*reads)


def test_a_killed_engine_leaves_no_client_without_an_answer_and_no_process_behind(launch_tiny: Launch) -> None:
    server = launch_tiny()

    async def run() -> None:
        async with streaming(server, 6, max_new_tokens=7000) as (client, streams, ends):
            plain = [asyncio.create_task(client.post("/generate", json=body(one, 7000))) for one in ADAPTERS]
            await asyncio.to_thread(wait_until, lambda: server.gauges()["loraplex_running"] == 9, "nine at work")
            server.kill("engine")
            await ends
            for stream in streams:
                assert stream.events[-1]["error_type"] == "generation"
                assert all("token" in event for event in stream.events[:-1])
            for response in await asyncio.gather(*plain):
                assert response.status_code in (424, 503)
                assert response.json()["error_type"] in ("generation", "healthcheck")

    asyncio.run(run())
    assert server.wait(LOSS_S) == 1
    (line,) = [line for line in server.said.splitlines() if "ERROR" in line]
    assert "engine was killed by SIGKILL" in line
    assert "Traceback" not in server.said


def test_a_killed_api_process_takes_the_engine_with_it(launch_tiny: Launch) -> None:
    server = launch_tiny()
    server.kill("api")
    assert server.wait(LOSS_S) == 1
    (line,) = [line for line in server.said.splitlines() if "ERROR" in line]
    assert "api was killed by SIGKILL" in line


def test_a_killed_launcher_takes_its_children_with_it(launch_tiny: Launch) -> None:
    server = launch_tiny()

    async def run() -> None:
        async with streaming(server, 3, max_new_tokens=7000) as (_, streams, ends):
            server.process.kill()
            await ends
            assert all(stream.events[-1]["error_type"] == "generation" for stream in streams)

    asyncio.run(run())
    server.process.wait()
    wait_until(lambda: not any(map(is_alive, server.pids.values())), "the end of every child", LOSS_S)


def test_sigterm_lets_running_streams_finish(launch_tiny: Launch) -> None:
    server = launch_tiny()

    async def run() -> None:
        async with streaming(server, 8, max_new_tokens=1200) as (_, streams, ends):
            server.process.send_signal(signal.SIGTERM)
            await ends
            for stream in streams:
                assert [event["index"] for event in stream.events] == list(range(1, 1201))
                assert stream.events[-1]["details"]["finish_reason"] == "length"

    asyncio.run(run())
    assert server.wait() == 0
    assert "stopping: " in server.said


def test_a_second_sigterm_ends_running_streams_with_an_error(launch_tiny: Launch) -> None:
    server = launch_tiny()

    async def run() -> None:
        async with streaming(server, 3, max_new_tokens=7000) as (_, streams, ends):
            server.process.send_signal(signal.SIGTERM)
            await asyncio.to_thread(wait_until, lambda: "stopping: 3 requests" in server.said, "the first")
            server.process.send_signal(signal.SIGTERM)
            await ends
            assert all(stream.events[-1]["error_type"] == "generation" for stream in streams)

    asyncio.run(run())
    assert server.wait() == 0


def start_that_fails(*args: str) -> tuple[int, str]:
    """The exit code of a command line that must not serve, and the one line that says why."""
    run = subprocess.run(
        [sys.executable, "-m", "loraplex", *args],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=HANG_S,
        check=False,
    )
    (line,) = (run.stdout + run.stderr).splitlines()
    return run.returncode, line


def test_adapters_that_are_refused_at_start_are_all_named_in_one_line(tiny_world: Path, tmp_path: Path) -> None:
    bad = shutil.copytree(tiny_world / "other", tmp_path / "bad")
    settings = json.loads((bad / "adapter_config.json").read_text())
    (bad / "adapter_config.json").write_text(json.dumps(settings | {"use_dora": True}))
    adapters = f"good={tiny_world / 'good'},bad={bad},gone={tmp_path / 'gone'}"
    code, line = start_that_fails(
        "--model-id",
        str(tiny_world / "base"),
        "--hostname",
        "127.0.0.1",
        "--port",
        str(free_port()),
        "--lora-adapters",
        adapters,
    )
    assert code == 1
    assert "'bad'" in line and "dora" in line.lower() and "'gone'" in line
    assert "'good'" not in line


def test_a_port_in_use_is_one_line(tiny_world: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = ("--hostname", "127.0.0.1", "--port", str(taken.getsockname()[1]))
        code, line = start_that_fails("--model-id", str(tiny_world / "base"), *address)
    assert code == 1
    assert "in use" in line and "--port" in line


def test_a_model_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    code, line = start_that_fails(
        "--model-id", str(tmp_path / "none"), "--hostname", "127.0.0.1", "--port", str(free_port())
    )
    assert code == 1
    assert str(tmp_path / "none") in line


def test_an_unknown_flag_is_one_line_with_the_nearest_name() -> None:
    code, line = start_that_fails("--model-id", "m", "--max-input-lenght", "3")
    assert code == 2
    assert "--max-input-length" in line


def test_weights_that_are_cut_off_end_the_start_with_one_error(
    launch: Launch, tiny_world: Path, tmp_path: Path
) -> None:
    model = shutil.copytree(tiny_world / "base", tmp_path / "cut")
    weights = model / "model.safetensors"
    os.truncate(weights, weights.stat().st_size // 2)
    server = launch("--model-id", str(model))
    assert server.process.wait(HANG_S) == 1
    (line,) = [line for line in server.said.splitlines() if "ERROR" in line]
    assert "model.safetensors" in line
    assert "Traceback" not in server.said
