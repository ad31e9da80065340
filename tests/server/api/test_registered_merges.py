"""Merges under names of their own: what requests for the name get, and what becomes of them when their parts change."""

import json
from pathlib import Path
from typing import Any

import pytest
from adapter_files import base_fields
from adapter_world import AdapterWorld, refusal, world
from scripted_engine import ScriptedEngine, TestServer, with_server

from loraplex_server.config import AdapterSourceConfig
from loraplex_server.messages import AdapterSpec

__all__ = ["world"]

BOTH = {"ids": ["a", "b"], "weights": [0.5, 2], "merge_strategy": "linear"}


async def upload(server: TestServer, world: AdapterWorld, name: str, rank: int, **query: str) -> str:
    """Serve an adapter; its digest."""
    files = [("file", item) for item in world.files(rank).items()]
    answer = await server.http.put(f"/adapters/{name}", files=files, params=query)
    await server.settled()
    return str(answer.json()["versions"][-1]["digest"])


async def register(server: TestServer, name: str = "both", **more: Any) -> Any:
    answer = await server.http.post("/adapters", json={"name": name, "merged_adapters": BOTH} | more)
    await server.settled()
    return answer


async def said(server: TestServer, name: str) -> str:
    answer = await server.generate(adapter_id=name)
    return str(answer.json().get("generated_text", answer.json().get("error_type")))


def serve(world: AdapterWorld, test: Any, **settings: Any) -> None:
    world.serve(test, allow_runtime_adapters=True, dynamic_adapters=False, **settings)


def merged(world: AdapterWorld) -> AdapterSpec:
    [spec] = [spec for spec in world.engine.adapters.values() if spec.merge is not None]
    return spec


def test_a_merge_is_asked_for_by_its_name_and_shown_with_its_parts(world: AdapterWorld) -> None:
    async def test(server: TestServer) -> None:
        parts = [await upload(server, world, "a", 2), await upload(server, world, "b", 4)]
        answer = (await register(server)).json()
        spec = merged(world)
        assert spec.merge is not None and spec.merge.digest == spec.digest
        assert [(part.digest, part.weight) for part in spec.merge.parts] == [(parts[0], 0.5), (parts[1], 2.0)]
        assert spec.rank == 2 + 4
        # By every way to name an adapter, and the same weights as a request that names the parts.
        chat = {"messages": [{"role": "user", "content": "hi"}]}
        for more in ({"model": "both"}, {"model": "tiny-base:both"}, {"merged_adapters": BOTH}):
            text = (await server.http.post("/v1/chat/completions", json=chat | more)).json()
            assert text["choices"][0]["message"]["content"] == f"<{spec.digest[:12]}>", text
        assert await said(server, "both") == f"<{spec.digest[:12]}>"
        [version] = answer["versions"]
        assert (version["source"], version["id"], version["digest"]) == ("merge", "linear(0.5*a+2*b)", spec.digest)
        assert version["merge"] == {
            "parts": [{"id": "a", "weight": 0.5, "digest": parts[0]}, {"id": "b", "weight": 2.0, "digest": parts[1]}],
            "merge_strategy": "linear", "density": 1.0, "majority_sign_method": "total",
        }  # fmt: skip
        model = (await server.http.get("/v1/models/both")).json()
        assert (model["parent"], model["merged_from"]) == ("tiny-base", ["a", "b"])
        assert "merged_from" not in (await server.http.get("/v1/models/a")).json()

    serve(world, test)


def test_a_merge_keeps_the_contents_it_was_registered_with_until_it_is_registered_again(world: AdapterWorld) -> None:
    async def test(server: TestServer) -> None:
        await upload(server, world, "a", 2)
        await upload(server, world, "b", 4)
        await register(server)
        before = await said(server, "both")
        replaced = await upload(server, world, "a", 8)
        await server.http.delete("/adapters/b")
        await server.until_idle()
        assert await said(server, "both") == before and await said(server, "b") == "adapter_not_found"
        # The files of what its parts were are there as long as it is.
        recipe = merged(world).merge
        assert recipe is not None and all(Path(part.path, "adapter_config.json").exists() for part in recipe.parts)
        # Registered again it is of what the names stand for now, or refused as a whole.
        assert refusal(await register(server)) == (404, "adapter_not_found")
        assert await said(server, "both") == before
        await upload(server, world, "b", 4)
        assert (await register(server)).json()["versions"][0]["merge"]["parts"][0]["digest"] == replaced
        assert await said(server, "both") not in (before, "adapter_not_found")

    serve(world, test)


def test_merges_have_versions_and_pins_and_leave_nothing_behind(world: AdapterWorld) -> None:
    async def test(server: TestServer) -> None:
        await upload(server, world, "a", 2)
        await upload(server, world, "b", 4)
        await register(server, pin=True)
        first = merged(world).digest
        assert first in world.engine.kept
        second = BOTH | {"weights": [1, 1], "merge_strategy": "ties", "density": 0.5}
        await register(server, merged_adapters=second, version="2", activate=False)
        assert await said(server, "both") == f"<{first[:12]}>"
        assert await said(server, "both@2") not in (f"<{first[:12]}>", "adapter_not_found")
        await server.http.put("/adapters/both", json={"active": "2"})
        assert await said(server, "both") == await said(server, "both@2")
        await server.settled()
        assert first not in world.engine.kept and len(world.engine.kept) == 1
        for name in ("both", "a", "b"):
            assert (await server.http.delete(f"/adapters/{name}")).status_code == 204
        await server.until_idle()
        assert world.engine.adapters == {} and world.engine.kept == set()
        assert await said(server, "both") == "adapter_not_found"

    serve(world, test)


def test_a_merge_survives_the_loss_of_the_engine(world: AdapterWorld) -> None:
    async def test(server: TestServer) -> None:
        await upload(server, world, "a", 2)
        await upload(server, world, "b", 4)
        await register(server, pin=True)
        known = dict(world.engine.adapters)
        world.engine.adapters.clear()
        world.engine.kept.clear()
        for message in server.state.adapters.meet_new_engine():
            await world.engine.send(message)
        assert known.items() <= world.engine.adapters.items() and world.engine.kept == {merged(world).digest}

    serve(world, test)


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ({"merged_adapters": BOTH | {"weights": [1]}}, 422, "2 ids and 1 weights"),
        ({"merged_adapters": BOTH | {"ids": ["a", "nobody"]}}, 404, "'nobody' is not known"),
        ({"merged_adapters": BOTH | {"ids": ["a", "mixed"]}}, 422, "it is a merge itself"),
        ({"merged_adapters": BOTH | {"ids": ["a", "shared"]}}, 422, "as in shared@1"),
        ({"merged_adapters": BOTH, "id": "place"}, 422, "exactly one of `id` and `merged_adapters`"),
        ({}, 422, "exactly one of `id` and `merged_adapters`"),
        ({"merged_adapters": BOTH, "preload": False}, 422, "leave `revision` and `preload` out"),
        ({"merged_adapters": BOTH, "name": "tiny-base"}, 422, "conflicts with the served base model"),
        ({"merged_adapters": BOTH, "name": "../x"}, 422, "an adapter's name must"),
    ],
)
def test_what_makes_no_merge_is_refused_and_enters_nothing(
    world: AdapterWorld, body: dict[str, Any], status: int, words: str
) -> None:
    async def test(server: TestServer) -> None:
        await upload(server, world, "a", 2)
        await upload(server, world, "b", 4)
        await register(server, "mixed")
        await upload(server, world, "shared", 1)
        await upload(server, world, "shared", 2, version="2", activate="false")
        await server.http.put("/adapters/shared", json={"split": {"1": 1, "2": 1}})
        listed = (await server.http.get("/adapters")).json()["adapters"]
        answer = await server.http.post("/adapters", json={"name": "new"} | body)
        assert (answer.status_code, words in answer.json()["error"]) == (status, True), answer.text
        assert [one["name"] for one in (await server.http.get("/adapters")).json()["adapters"]] == [
            one["name"] for one in listed
        ]

    serve(world, test)


LISTED = '{"name": "both", "merged_adapters": {"ids": ["a", "b"], "weights": [1, 2]}}'


def listed(world: AdapterWorld, *lines: str) -> str:
    file = world.folder / "adapters.txt"
    file.write_text("\n".join(["# ours", *lines, ""]))
    return str(file)


def test_a_merge_of_the_start_list_is_of_what_its_parts_are_at_its_first_use(world: AdapterWorld) -> None:
    places = [f"{name}={world.place(name, rank)}" for name, rank in (("a", 2), ("b", 4))]
    settings = {"adapter_list": listed(world, *places, LISTED), "adapter_state": str(world.cache)}
    said_before: list[str] = []

    async def first(server: TestServer) -> None:
        shown = (await server.http.get("/adapters/both")).json()["versions"][0]
        assert (shown["id"], shown["tier"]) == ("linear(1*a+2*b)", None)
        assert [part["digest"] for part in shown["merge"]["parts"]] == [None, None]
        assert (await server.http.put("/adapters/both", json={"pinned": True})).status_code == 200
        said_before.append(await said(server, "both"))
        spec = merged(world)
        assert said_before == [f"<{spec.digest[:12]}>"] and spec.rank == 2 + 4
        await upload(server, world, "a", 8)
        assert await said(server, "both") == said_before[0]
        # A change of its name writes down what it is now.
        await server.http.put("/adapters/both", json={"pinned": False})

    async def second(server: TestServer) -> None:
        assert await said(server, "both") == said_before[0]

    serve(world, first, **settings)
    world.engine = ScriptedEngine()
    serve(world, second, **settings)


def test_merges_of_the_start_list_that_name_each_other_are_refused(world: AdapterWorld) -> None:
    lines = [LISTED.replace('"a"', '"again"'), LISTED.replace('"both"', '"again"').replace('"a"', '"both"')]
    places = [f"b={world.place('b', 4)}"]

    async def test(server: TestServer) -> None:
        for name in ("both", "again"):
            answer = await server.generate(adapter_id=name)
            assert (
                refusal(answer) == (422, "adapter_unsupported") and f"'{name}' is a merge: " in answer.json()["error"]
            )
        assert (await said(server, "b")).startswith("<")

    serve(world, test, adapter_list=listed(world, *places, *lines))


def test_only_who_may_change_adapters_registers_a_merge(world: AdapterWorld) -> None:
    async def test(server: TestServer) -> None:
        assert refusal(await register(server)) == (403, "forbidden")

    world.serve(test)


def test_a_merge_has_no_chat_template_of_the_folder_that_the_server_was_started_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(base_fields()))
    (tmp_path / "chat_template.jinja").write_text("not the model's")
    monkeypatch.chdir(tmp_path)

    async def test(server: TestServer) -> None:
        merge = BOTH | {"ids": ["pirate", "json"]}
        await server.http.post("/adapters", json={"name": "both", "merged_adapters": merge})
        chat = {"model": "both", "messages": [{"role": "user", "content": "hi"}]}
        assert (await server.http.post("/v1/chat/completions", json=chat)).status_code == 200
        assert bytes(server.engine.requests.pop().prompt_token_ids).decode() == "u:hi;a:"

    with_server(
        test,
        model_path=str(tmp_path),
        adapter_chat_templates=True,
        sources=AdapterSourceConfig(allow_runtime_adapters=True),
    )
