"""Permits, clients that leave, clients that do not read, an engine that is gone."""

import asyncio
import json
from typing import Any

import pytest
from scripted_engine import DEADLINE_S, ScriptedEngine, TestServer, api_server, with_server

from loraplex_server.api import client as client_module
from loraplex_server.api.job import GenerationJob
from loraplex_server.errors import GenerationFailed


def gated() -> ScriptedEngine:
    return ScriptedEngine(gate=asyncio.Event(), gate_at=2)


def raw_request(path: str, **parameters: Any) -> bytes:
    body = json.dumps({"inputs": "hi", "parameters": parameters}).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: t\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


async def open_raw(
    server: TestServer, path: str, headers: bytes = b""
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    host, port = server.base_url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(raw_request(path).replace(b"\r\n", b"\r\n" + headers, 1))
    return reader, writer


async def until(condition: Any) -> None:
    while not condition():
        await asyncio.sleep(0.005)


def test_a_request_above_the_limit_is_429_at_once_and_the_permit_comes_back() -> None:
    async def test(server: TestServer) -> None:
        waiting = asyncio.create_task(server.generate("hi"))
        await until(lambda: server.engine.requests)
        refused = await server.generate("hi")
        assert (refused.status_code, refused.json()) == (
            429,
            {"error": "Model is overloaded", "error_type": "overloaded"},
        )
        assert 1 <= int(refused.headers["retry-after"]) <= 60
        stream = await server.generate("hi", path="/generate_stream")
        assert stream.content == b'data: {"error":"Model is overloaded","error_type":"overloaded"}\n\n'
        server.engine.gate.set()
        assert (await waiting).status_code == 200
        assert (await server.generate("hi")).status_code == 200

    async def run() -> None:
        async with api_server(gated(), max_concurrent_requests=1) as server:
            await test(server)

    asyncio.run(run())


def test_best_of_takes_a_permit_for_each_sequence() -> None:
    async def test(server: TestServer) -> None:
        assert (await server.generate("hi", best_of=2, do_sample=True)).status_code == 429
        assert (await server.generate("hi")).status_code == 200

    with_server(test, max_concurrent_requests=1)


def test_overload_is_reported_before_the_fields_are_checked() -> None:
    async def test(server: TestServer) -> None:
        assert (await server.generate("hi", temperature=-1.0)).status_code == 422
        with server.admission.permits(1):
            assert (await server.generate("hi", temperature=-1.0)).status_code == 429
            assert (await server.generate("hi", best_of=3)).status_code == 422

    with_server(test, max_concurrent_requests=1)


@pytest.mark.parametrize("path", ["/generate", "/generate_stream", "/"])
@pytest.mark.parametrize("is_reset", [False, True])
@pytest.mark.parametrize("settings", [{}, {"api_key": ("key",), "cors_allow_origin": ("http://a",)}])
def test_a_client_that_leaves_takes_its_request_off_the_engine(
    path: str, is_reset: bool, settings: dict[str, tuple[str, ...]]
) -> None:
    async def run() -> None:
        async with asyncio.timeout(DEADLINE_S), api_server(gated(), live=True, **settings) as server:
            _, writer = await open_raw(server, path, b"authorization: Bearer key\r\norigin: http://a\r\n")
            await until(lambda: server.engine.requests)
            if is_reset:
                writer.transport.abort()
            else:
                writer.close()
            await until(lambda: server.engine.aborted)
            await server.until_idle()
            assert 'tgi_request_failure{err="dropped"} 1' in (await server.http.get("/metrics")).text

    asyncio.run(run())


def test_200_disconnects_leave_nothing_behind() -> None:
    async def run() -> None:
        async with asyncio.timeout(DEADLINE_S), api_server(gated(), live=True, max_concurrent_requests=500) as server:
            connections = [await open_raw(server, "/generate_stream") for _ in range(200)]
            await until(lambda: len(server.engine.requests) == 200)
            for reader, writer in connections:
                await reader.readuntil(b"\n\n")
                writer.transport.abort()
            await server.until_idle()
            assert len(server.engine.aborted) == 200
            server.engine.gate.set()
            assert (await server.generate("hi")).status_code == 200

    asyncio.run(run())


def test_a_reader_that_falls_too_far_behind_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "MAX_WAITING_OUTPUTS", 3)

    async def test(server: TestServer) -> None:
        generator = (await server.state.serving()).generator
        deltas = generator.stream(GenerationJob(prompt="hi"), "slow")
        await anext(deltas)
        await until(lambda: server.engine.aborted)
        with pytest.raises(GenerationFailed, match="has not read for 3 tokens"):
            async for _ in deltas:
                pass
        await server.until_idle()

    with_server(test)


def test_the_engines_loss_ends_every_request_and_refuses_new_ones() -> None:
    async def run() -> None:
        async with asyncio.timeout(DEADLINE_S), api_server(gated()) as server:
            plain = asyncio.create_task(server.generate("hi"))
            stream = asyncio.create_task(server.generate("hi", path="/generate_stream"))
            await until(lambda: len(server.engine.requests) == 2)
            server.state.phase = "failed"
            server.engine_client.fail_all(GenerationFailed("Server error: the engine has stopped"))
            assert (await plain).status_code == 424
            assert (await stream).content.count(b'"error_type":"generation"') == 1
            assert (await server.http.get("/health")).status_code == 503
            refused = await server.generate("hi")
            assert (refused.status_code, refused.json()["error_type"]) == (503, "healthcheck")

    asyncio.run(run())


def test_64_streams_at_once_are_each_complete() -> None:
    async def run() -> None:
        async with asyncio.timeout(DEADLINE_S), api_server(live=True) as server:
            adapters = [None, "pirate", "json"]
            answers = await asyncio.gather(
                *(
                    server.generate("hi", path="/generate_stream", adapter_id=adapters[i % 3], details=True)
                    for i in range(64)
                )
            )
            for i, answer in enumerate(answers):
                events = [json.loads(event.removeprefix("data: ")) for event in answer.text.split("\n\n") if event]
                text = server.engine.texts[adapters[i % 3]]
                assert events[-1]["generated_text"] == text
                assert "".join(event["token"]["text"] for event in events[:-1]) == text
                assert [event["index"] for event in events] == list(range(1, len(events) + 1))

    asyncio.run(run())
