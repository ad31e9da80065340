"""Adapters that come because a request names them: from the hub (a stand-in) and from below a root."""

import asyncio
from threading import Lock
from typing import Any

import pytest
from adapter_world import AdapterWorld, refusal, world
from scripted_engine import TestServer

from loraplex_server.adapter_intake import AdapterIntake

__all__ = ["world"]


def test_an_unknown_hub_adapter_is_fetched_checked_and_answers(world: AdapterWorld) -> None:
    repository = world.publish("acme/pirate")

    async def test(server: TestServer) -> None:
        answer = await server.generate(adapter_id="acme/pirate")
        assert answer.status_code == 200, answer.text
        [digest] = world.digests()
        assert answer.json()["generated_text"] == f"<{digest[:12]}>"
        assert answer.headers["x-adapter-id"] == "acme/pirate"
        spec = world.engine.adapters[digest]
        assert (spec.source, spec.revision, spec.rank) == ("hub", repository.commit, 4)
        await server.generate(adapter_id="acme/pirate")

    world.serve(test)
    assert world.hub.downloaded() == {"adapter_config.json", "adapter_model.safetensors"}
    assert sum("/resolve/" in line and line.startswith("GET") for line in world.hub.requests) == 2
    assert world.left_behind() == []


def test_all_openai_routes_fetch_too(world: AdapterWorld) -> None:
    world.publish("acme/pirate")

    async def test(server: TestServer) -> None:
        chat = await server.http.post(
            "/v1/chat/completions", json={"model": "acme/pirate", "messages": [{"role": "user", "content": "hi"}]}
        )
        assert (chat.status_code, chat.json()["model"]) == (200, "acme/pirate")
        completion = await server.http.post(
            "/v1/completions", json={"model": "tiny-base:acme/pirate", "prompt": "hi", "stream": True}
        )
        assert completion.status_code == 200 and "[DONE]" in completion.text
        assert "acme/pirate" in {model["id"] for model in (await server.http.get("/v1/models")).json()["data"]}

    world.serve(test)


def test_a_hundred_first_requests_make_one_download(world: AdapterWorld) -> None:
    world.publish("acme/pirate")

    async def test(server: TestServer) -> None:
        answers = await asyncio.gather(*(server.generate(adapter_id="acme/pirate") for _ in range(100)))
        assert {answer.status_code for answer in answers} == {200}
        assert len(world.digests()) == 1

    world.serve(test)
    assert sum(line.startswith("GET /acme") for line in world.hub.requests) == 2


def test_a_failure_answers_all_who_wait_alike(world: AdapterWorld) -> None:
    world.hub.status = 503

    async def test(server: TestServer) -> None:
        answers = await asyncio.gather(*(server.generate(adapter_id="acme/pirate") for _ in range(20)))
        assert {refusal(answer) for answer in answers} == {(424, "adapter_unavailable")}
        assert {answer.headers["retry-after"] for answer in answers} == {"5"}
        assert len({answer.text for answer in answers}) == 1
        assert (await server.generate()).status_code == 200

    world.serve(test)


def test_with_dynamic_adapters_off_an_unknown_id_is_404_and_the_hub_is_not_asked(world: AdapterWorld) -> None:
    world.publish("acme/pirate")

    async def test(server: TestServer) -> None:
        assert refusal(await server.generate(adapter_id="acme/pirate")) == (404, "adapter_not_found")
        assert "pirate" in (await server.generate(adapter_id="pirat")).json()["error"]

    world.serve(test, dynamic_adapters=False)
    assert world.hub.requests == []


def test_a_folder_below_the_root_is_found_by_its_name_and_by_its_path(world: AdapterWorld) -> None:
    folder = world.place("team/legal")

    async def test(server: TestServer) -> None:
        for adapter_id in ("team/legal", str(folder)):
            answer = await server.generate(adapter_id=adapter_id, adapter_source="local")
            assert answer.status_code == 200, answer.text
        assert len(world.digests()) == 1
        for path in ("/adapters", "/v1/models"):
            listed = (await server.http.get(path)).text
            assert "team/legal" in listed and str(world.folder) not in listed

    world.serve(test)
    assert world.hub.requests == []


def test_only_so_many_adapters_are_fetched_at_a_time_and_only_so_many_requests_wait(
    world: AdapterWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    bring, lock, at_once = AdapterIntake.bring, Lock(), [0, 0]

    def counted(*arguments: Any) -> Any:
        with lock:
            at_once[0] += 1
            at_once[1] = max(at_once)
        try:
            return bring(*arguments)
        finally:
            with lock:
                at_once[0] -= 1

    monkeypatch.setattr(AdapterIntake, "bring", counted)
    for i in range(6):
        world.publish(f"acme/{i}")
    world.hub.may_go_on.clear()

    async def test(server: TestServer) -> None:
        fetches = [asyncio.create_task(server.generate(adapter_id=f"acme/{i}")) for i in range(6)]
        while at_once[1] < 2:
            await asyncio.sleep(0.005)
        answer = await server.generate(adapter_id="acme/more")
        assert refusal(answer) == (429, "overloaded") and answer.headers["retry-after"]
        assert (await server.generate()).status_code == 200
        world.hub.may_go_on.set()
        assert {answer.status_code for answer in await asyncio.gather(*fetches)} == {200}

    world.serve(test, max_adapter_fetches=2, max_concurrent_requests=6)
    assert at_once == [0, 2]


def test_a_request_whose_adapter_is_fetched_takes_no_permit_from_others(world: AdapterWorld) -> None:
    world.publish("acme/slow")
    world.hub.may_go_on.clear()

    async def test(server: TestServer) -> None:
        slow = asyncio.create_task(server.generate(adapter_id="acme/slow"))
        while not world.hub.requests:
            await asyncio.sleep(0.005)
        assert (await server.generate()).status_code == 200
        assert not slow.done()
        world.hub.may_go_on.set()
        assert (await slow).status_code == 200

    world.serve(test, max_concurrent_requests=1)


def test_the_engine_forgets_nothing_that_a_request_still_uses(world: AdapterWorld) -> None:
    world.publish("acme/pirate")
    world.engine.gate, world.engine.gate_at = asyncio.Event(), 2

    async def test(server: TestServer) -> None:
        running = asyncio.create_task(server.generate(adapter_id="acme/pirate"))
        while not world.engine.requests:
            await asyncio.sleep(0.005)
        assert server.state.adapters.forget_dynamic("acme/pirate")
        await asyncio.sleep(0.02)
        assert len(world.digests()) == 1
        world.engine.gate.set()
        assert (await running).status_code == 200
        await server.until_idle()
        assert world.digests() == []

    world.serve(test)
