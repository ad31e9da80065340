import asyncio
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loraplex_server.link import ApiLink, EngineLink
from loraplex_server.messages import (
    AbortRequest,
    AdapterSpec,
    AdapterStatus,
    EngineReady,
    EngineStats,
    GenerateRequest,
    LoadAdapter,
    SamplingParams,
    StepOutput,
    TokenOutput,
    TopLogprob,
    UnloadAdapter,
)

SPEC = AdapterSpec(adapter_id="é/a", digest="d", path="/p", rank=4, num_bytes=1)
REQUEST = GenerateRequest(
    request_id="r#1",
    prompt_token_ids=[1, 2, 3],
    sampling=SamplingParams(max_new_tokens=3, seed=2**64 - 1, stop_token_ids=(7,), temperature=0.1),
    adapter_id="é/a",
    adapter_digest="d",
)
TO_ENGINE = [REQUEST, AbortRequest(request_id="r#1"), LoadAdapter(spec=SPEC), UnloadAdapter(digest="d")]
FROM_ENGINE = [
    EngineReady(
        max_input_tokens=1, max_total_tokens=2, max_batch_prefill_tokens=3, max_batch_total_tokens=4, max_batch_size=5,
        num_kv_blocks=6, block_size=7, vocab_size=8, end_token_ids=[2], dtype="float32", device="cpu", max_loras=9,
    ),
    StepOutput(
        outputs=[
            TokenOutput(
                request_id="r#1", token_ids=[5], logprobs=[-0.5], top_logprobs=[[TopLogprob(5, -0.5)]],
                finish_reason="length", prompt_logprobs=[None, -1.5], queue_time_s=0.1,
            )
        ],
        stats=EngineStats(num_running=1, running_adapters={"é/a": 1}, forward_s=[0.1]),
    ),
    AdapterStatus(adapter_id="é/a", digest="d", tier="disk", error="gone"),
]  # fmt: skip


def linked(use: Callable[[ApiLink, EngineLink], Any], folder: Path) -> None:
    """Run `use` with both ends."""

    async def run() -> None:
        api = ApiLink(str(folder))
        engine = EngineLink(str(folder))
        try:
            async with asyncio.timeout(30):
                await use(api, engine)
        finally:
            engine.close()
            api.close()

    asyncio.run(run())


async def received(engine: EngineLink, count: int) -> list[Any]:
    messages: list[Any] = []
    while len(messages) < count:
        await asyncio.to_thread(engine.wait, 5.0)
        messages += engine.receive()
    return messages


def test_every_message_arrives_as_it_was_sent_and_in_order(tmp_path: Path) -> None:
    async def use(api: ApiLink, engine: EngineLink) -> None:
        for message in TO_ENGINE:
            await api.send(message)
        assert await received(engine, len(TO_ENGINE)) == TO_ENGINE
        for message in FROM_ENGINE:
            engine.send(message)
        assert [await api.receive() for _ in FROM_ENGINE] == FROM_ENGINE

    linked(use, tmp_path)


def test_a_thousand_messages_sent_before_anybody_reads_are_kept(tmp_path: Path) -> None:
    async def use(api: ApiLink, engine: EngineLink) -> None:
        aborts = [AbortRequest(request_id=str(number)) for number in range(1000)]
        for abort in aborts:
            await api.send(abort)
        assert await received(engine, 1000) == aborts

    linked(use, tmp_path)


def test_receiving_without_a_message_does_not_wait(tmp_path: Path) -> None:
    async def use(api: ApiLink, engine: EngineLink) -> None:
        assert engine.receive() == []

    linked(use, tmp_path)


def test_a_watched_descriptor_ends_the_wait(tmp_path: Path) -> None:
    async def use(api: ApiLink, engine: EngineLink) -> None:
        ours, theirs = socket.socketpair()
        with ours, theirs:
            engine.watch(theirs.fileno())
            waiting = asyncio.create_task(asyncio.to_thread(engine.wait, 3600.0))
            ours.send(b"x")
            await waiting

    linked(use, tmp_path)


@pytest.mark.parametrize("name", ["to_engine", "from_engine"])
def test_the_sockets_lie_in_the_private_folder(name: str, tmp_path: Path) -> None:
    async def use(api: ApiLink, engine: EngineLink) -> None:
        assert (tmp_path / name).is_socket()

    linked(use, tmp_path)
