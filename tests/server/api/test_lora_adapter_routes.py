"""vLLM's routes that load and unload adapters: bodies, answers and statuses as its users and controllers know them."""

import asyncio
from typing import Any

import httpx
import pytest
from adapter_world import AdapterWorld, world
from scripted_engine import TestServer

__all__ = ["world"]


async def load(server: TestServer, name: str = "legal", path: str = "legal", **more: Any) -> httpx.Response:
    answer = await server.http.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": path, **more})
    await server.settled()
    return answer


async def unload(server: TestServer, name: str = "legal") -> httpx.Response:
    answer = await server.http.post("/v1/unload_lora_adapter", json={"lora_name": name})
    await server.settled()
    return answer


def test_load_use_and_unload(world: AdapterWorld) -> None:
    folder = world.place("legal")

    async def test(server: TestServer) -> None:
        answer = await load(server, path=str(folder))
        assert (answer.status_code, answer.text) == (200, "Success: LoRA adapter 'legal' added successfully.")
        assert answer.headers["content-type"].startswith("text/plain")
        [digest] = world.digests()
        said = await server.generate(adapter_id="legal")
        assert said.json()["generated_text"] == f"<{digest[:12]}>"
        assert "legal" in [model["id"] for model in (await server.http.get("/v1/models")).json()["data"]]
        answer = await unload(server)
        assert (answer.status_code, answer.text) == (200, "Success: LoRA adapter 'legal' removed successfully.")
        assert world.digests() == []
        assert (await server.generate(adapter_id="legal")).status_code == 404

    world.serve(test, allow_runtime_adapters=True, dynamic_adapters=False)


def test_a_hub_id_is_a_path_too(world: AdapterWorld) -> None:
    world.publish("acme/pirate")

    async def test(server: TestServer) -> None:
        assert (await load(server, "p", "acme/pirate")).status_code == 200
        assert len(world.digests()) == 1

    world.serve(test, allow_runtime_adapters=True, dynamic_adapters=False)


@pytest.mark.parametrize(
    ("body", "status", "error_type", "words"),
    [
        ({"lora_name": "", "lora_path": "legal"}, 400, "InvalidUserInput", "'lora_name' and 'lora_path' must be"),
        ({"lora_name": "a", "lora_path": ""}, 400, "InvalidUserInput", "'lora_name' and 'lora_path' must be"),
        ({"lora_name": "tiny-base", "lora_path": "legal"}, 400, "InvalidUserInput", "conflicts with the served base"),
        ({"lora_name": "pirate", "lora_path": "legal"}, 400, "InvalidUserInput", "has already been loaded"),
        ({"lora_name": "new", "lora_path": "nothing"}, 404, "NotFoundError", "no such folder"),
        ({"lora_name": "new", "lora_path": "/etc"}, 404, "NotFoundError", "no such folder"),
        ({"lora_name": "new", "lora_path": "acme/none"}, 404, "NotFoundError", "acme/none"),
        ({"lora_name": "new", "lora_path": "broken"}, 422, "BadRequestError", "adapter_config.json"),
        ({"lora_name": "new"}, 422, "BadRequestError", "lora_path"),
    ],
)
def test_what_cannot_be_loaded(
    world: AdapterWorld, body: dict[str, str], status: int, error_type: str, words: str
) -> None:
    world.place("legal")
    (world.place("broken") / "adapter_config.json").write_text("{")

    async def test(server: TestServer) -> None:
        answer = await server.http.post("/v1/load_lora_adapter", json=body)
        assert answer.status_code == status, answer.text
        content = answer.json()
        assert content["error"]["type"] == content["type"] == error_type
        assert content["error"]["code"] == status
        assert words in content["error"]["message"] == content["message"]
        assert world.digests() == []

    world.serve(test, allow_runtime_adapters=True)


def test_a_rank_above_the_limit_is_refused_in_vllms_words(world: AdapterWorld) -> None:
    world.place("legal", rank=4)

    async def test(server: TestServer) -> None:
        answer = await load(server)
        assert answer.status_code == 422
        assert "is greater than max_lora_rank" in answer.json()["message"]

    world.serve(test, allow_runtime_adapters=True, max_lora_rank=2)


def test_unloading_an_unknown_name_is_404(world: AdapterWorld) -> None:
    async def test(server: TestServer) -> None:
        answer = await unload(server, "nobody")
        assert (answer.status_code, answer.json()["error"]["type"]) == (404, "NotFoundError")
        assert answer.json()["error"]["message"] == "The lora adapter 'nobody' cannot be found."
        assert (await unload(server, "")).json()["error"]["type"] == "InvalidUserInput"

    world.serve(test, allow_runtime_adapters=True)


def test_load_inplace_replaces_and_what_was_admitted_ends_on_the_old_weights(world: AdapterWorld) -> None:
    world.place("one", rank=4)
    world.place("two", rank=8)
    world.engine.gate, world.engine.gate_at = asyncio.Event(), 3

    async def test(server: TestServer) -> None:
        assert (await load(server, path="one")).status_code == 200
        [old] = world.digests()
        before = asyncio.create_task(server.generate(adapter_id="legal"))
        while not world.engine.requests:
            await asyncio.sleep(0.005)
        assert (await load(server, path="two", load_inplace=True)).status_code == 200
        assert len(world.digests()) == 2
        world.engine.gate.set()
        assert (await before).json()["generated_text"] == f"<{old[:12]}>"
        await server.until_idle()
        [new] = world.digests()
        assert (
            (await server.generate(adapter_id="legal")).json()["generated_text"] == f"<{new[:12]}>" != f"<{old[:12]}>"
        )

    world.serve(test, allow_runtime_adapters=True)


def test_a_replacement_that_fails_keeps_the_old_one_and_the_list_says_why(world: AdapterWorld) -> None:
    folder = world.place("one")

    async def test(server: TestServer) -> None:
        await load(server, path="one")
        [old] = world.digests()
        (folder / "adapter_model.safetensors").write_bytes(b"broken")
        answer = await load(server, path="one", load_inplace=True)
        assert answer.status_code == 422
        assert (await server.generate(adapter_id="legal")).json()["generated_text"] == f"<{old[:12]}>"
        shown = (await server.http.get("/adapters/legal")).json()
        assert "safetensors" in shown["error"]

    world.serve(test, allow_runtime_adapters=True)


def test_without_the_right_to_it_every_change_is_403_that_says_so(world: AdapterWorld) -> None:
    world.place("legal")

    async def test(server: TestServer) -> None:
        for answer in (await load(server), await unload(server, "pirate")):
            assert answer.status_code == 403
            assert "--allow-runtime-adapters" in answer.json()["error"]["message"]
        for method, path in (("POST", "/adapters"), ("PUT", "/adapters/pirate"), ("DELETE", "/adapters/pirate")):
            answer = await server.http.request(method, path, json={})
            assert (answer.status_code, answer.json()["error_type"]) == (403, "forbidden")
        assert (await server.generate(adapter_id="pirate")).status_code == 200

    world.serve(test)


def test_the_admin_key_opens_changes_and_nothing_else_does(world: AdapterWorld) -> None:
    world.place("legal")

    async def test(server: TestServer) -> None:
        for key, status in ((None, 401), ("user", 403), ("boss", 200)):
            server.http.headers.pop("authorization", None)
            if key:
                server.http.headers["authorization"] = f"Bearer {key}"
            assert (await load(server)).status_code == status
        assert (await server.generate(adapter_id="legal")).status_code == 200

    world.serve(test, admin_api_key="boss", api_key=("user",), allow_runtime_adapters=True)


def test_sglangs_spelling_has_sglangs_answer(world: AdapterWorld) -> None:
    world.place("legal")

    async def test(server: TestServer) -> None:
        body = {"lora_name": "legal", "lora_path": "legal", "pinned": True}
        answer = await server.http.post("/load_lora_adapter", json=body)
        assert answer.status_code == 200
        assert answer.json()["success"] is True and "legal" in answer.json()["loaded_adapters"]
        answer = await server.http.post("/load_lora_adapter", json=body)
        assert (answer.status_code, answer.json()["success"]) == (400, False)
        assert "already" in answer.json()["error_message"]
        answer = await server.http.post("/unload_lora_adapter", json={"lora_name": "legal"})
        assert answer.json()["success"] is True and "legal" not in answer.json()["loaded_adapters"]

    world.serve(test, allow_runtime_adapters=True)
