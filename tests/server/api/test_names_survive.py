"""Names, versions, splits, pins and uploads of a server that ends at any point, and what the next one makes of them."""

import asyncio
import os
import random
import shutil
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from adapter_world import AdapterWorld, refusal, world
from scripted_engine import ScriptedEngine, TestServer

from loraplex_server import adapter_state, adapter_store
from loraplex_server.adapter_location import AdapterLocation
from loraplex_server.adapter_origin import AdapterOrigin
from loraplex_server.adapter_registry import AdapterRegistry
from loraplex_server.adapter_state import AdapterState, KeptName, KeptVersion
from loraplex_server.api import adapter_finder

__all__ = ["world"]

State = dict[str, Any]


def serve(
    world: AdapterWorld, test: Callable[[TestServer], Awaitable[None]], folder: Path | None = None, **settings: Any
) -> None:
    """One life of a server over a folder; its engine knows nothing but what it is told."""
    world.engine = ScriptedEngine()
    state = str(folder or world.folder / "state")
    world.serve(
        test, **{"allow_runtime_adapters": True, "dynamic_adapters": False, "adapter_state": state,
                 "adapter_cache": state} | settings
    )  # fmt: skip


async def upload(server: TestServer, world: AdapterWorld, name: str, rank: int, **query: str) -> None:
    files = [("file", item) for item in world.files(rank).items()]
    answer = await server.http.put(f"/adapters/{name}", files=files, params=query)
    assert answer.status_code == 200, answer.text


async def merge(server: TestServer, name: str, *ids: str, **more: Any) -> Any:
    merged = {"ids": ids, "weights": [1.0] * len(ids)}
    return await server.http.post("/adapters", json={"name": name, "merged_adapters": merged} | more)


async def names(server: TestServer) -> State:
    """What every name stands for, as far as it must survive."""
    found = {}
    for one in (await server.http.get("/adapters")).json()["adapters"]:
        versions = {
            version["version"]: [part["digest"] for part in version["merge"]["parts"]]
            if "merge" in version
            else version["digest"]
            for version in one["versions"]
        }
        shares = {version["version"]: round(version["share"], 9) for version in one["versions"] if version["share"]}
        found[one["name"]] = (versions, shares, one["pinned"])
    return found


async def answers(server: TestServer) -> dict[str, str]:
    """What each version of each name says, or why it does not."""
    found = {}
    for name, (versions, _, _) in (await names(server)).items():
        for version in versions:
            answer = (await server.generate(adapter_id=f"{name}@{version}")).json()
            found[f"{name}@{version}"] = answer.get("generated_text", answer.get("error_type"))
    return found


def test_all_that_names_stand_for_is_there_again(world: AdapterWorld) -> None:
    world.publish("acme/legal", 4)
    world.place("team/own", 8)
    before: list[Any] = []

    async def first(server: TestServer) -> None:
        post = server.http.post
        assert (await post("/adapters", json={"name": "legal", "id": "acme/legal"})).status_code == 200
        assert (await post("/adapters", json={"name": "own", "id": "team/own", "source": "local"})).status_code == 200
        assert (await post("/adapters", json={"name": "late", "id": "acme/legal", "preload": False})).status_code == 200
        await upload(server, world, "sent", 1)
        await upload(server, world, "sent", 2, version="new", activate="false")
        await server.http.put("/adapters/sent", json={"split": {"1": 3, "new": 1}, "pinned": True})
        assert (await merge(server, "both", "legal", "sent@new", pin=True)).status_code == 200
        await server.http.put("/adapters/pirate", json={"pinned": True})  # a name of the start
        await server.http.delete("/adapters/json")
        before.extend([await names(server), await answers(server)])

    async def second(server: TestServer) -> None:
        assert await names(server) == before[0] | {"late": ({"1": None}, {"1": 1.0}, False)}
        assert "json" not in before[0]
        listed = (await server.http.get("/adapters")).json()["adapters"]
        sources = {one["name"]: (one["versions"][0]["source"], one["versions"][0]["id"]) for one in listed}
        assert (sources["sent"], sources["legal"]) == (("upload", "upload"), ("hub", "acme/legal"))
        assert sources["both"] == ("merge", "linear(1*legal+1*sent@new)")
        told = await answers(server)
        # The one that lay in a folder which the tests' engine knew at its start was never a real one.
        assert told.pop("pirate@1") == "adapter_not_found" and before[1].pop("pirate@1") == "arr"
        assert told == before[1]

    serve(world, first)
    calls = len(world.hub.requests)
    serve(world, second)
    # What is on disk still is not fetched again; only what nobody had looked at is.
    assert {name for name, (versions, _, _) in before[0].items() if None in versions.values()} <= {"late"}
    assert len(world.hub.requests) > calls


def test_names_of_the_start_list_can_be_changed_before_they_are_looked_at(world: AdapterWorld) -> None:
    (world.folder / "list").write_text(f"a={world.place('a', 1)}\nb={world.place('b', 2)}\n")
    settings = {"adapter_list": str(world.folder / "list")}
    said: dict[str, str] = {}

    async def first(server: TestServer) -> None:
        assert (await server.http.put("/adapters/a", json={"pinned": True})).status_code == 200
        await upload(server, world, "b", 3, version="2", activate="false")
        said.update(await answers(server))
        assert (await server.http.put("/adapters/a", json={"pinned": False})).status_code == 200

    async def second(server: TestServer) -> None:
        assert await answers(server) == said

    serve(world, first, **settings)
    serve(world, second, **settings)
    serve(world, first, adapter_state=None, **settings)


def test_what_the_hub_had_then_is_served_although_it_has_moved_on_or_is_gone(world: AdapterWorld) -> None:
    world.publish("acme/legal", 4)
    said: list[str] = []

    async def first(server: TestServer) -> None:
        await server.http.post("/adapters", json={"name": "legal", "id": "acme/legal"})
        said.append((await server.generate(adapter_id="legal")).text)

    async def again(server: TestServer) -> None:
        assert (await server.generate(adapter_id="legal")).text == said[0]

    async def without_files(server: TestServer) -> None:
        answer = await server.generate(adapter_id="legal")
        assert answer.status_code == 404 and "legal" in answer.json()["error"]

    serve(world, first)
    [file] = (world.folder / "state").glob("complete/*/adapter_model.safetensors")
    damaged(file)
    serve(world, again)  # by fetching it again
    del world.hub.repositories["acme/legal"]
    serve(world, again)
    for folder in (world.folder / "state" / "complete").iterdir():
        shutil.rmtree(folder)
    serve(world, without_files)


def test_a_private_adapter_needs_a_token_again_and_no_token_is_written(world: AdapterWorld) -> None:
    world.publish("acme/secret", 4, token="hf_canary", private=True)
    body = {"name": "secret", "id": "acme/secret", "api_token": "hf_canary"}

    async def first(server: TestServer) -> None:
        assert (await server.http.post("/adapters", json=body)).status_code == 200
        assert (await merge(server, "of-it", "secret")).status_code == 200

    async def second(server: TestServer) -> None:
        for name in ("secret", "of-it"):
            answer = await server.generate(adapter_id=name)
            assert answer.status_code in (403, 404) and name in answer.json()["error"], answer.text
        assert (await server.http.post("/adapters", json=body)).status_code == 200
        assert (await server.generate(adapter_id="secret")).status_code == 200

    serve(world, first)
    written = b"".join(path.read_bytes() for path in (world.folder / "state" / "names").iterdir())
    assert b"acme/secret" in written and b"hf_" not in written
    serve(world, second)
    serve(world, lambda server: served(server, "secret", "of-it"), hub_token="hf_canary")


async def served(server: TestServer, *ids: str) -> None:
    for name in ids:
        assert (await server.generate(adapter_id=name)).status_code == 200


def damaged(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def test_files_that_are_damaged_or_gone_are_an_error_of_their_own_names(world: AdapterWorld) -> None:
    async def first(server: TestServer) -> None:
        for rank, name in enumerate(("broken", "gone", "whole"), start=1):
            await upload(server, world, name, rank)
        await merge(server, "of-broken", "broken", "whole")

    async def second(server: TestServer) -> None:
        broken, gone, merged, whole = [
            await server.generate(adapter_id=name) for name in ("broken", "gone", "of-broken", "whole")
        ]
        assert refusal(broken) == (422, "adapter_invalid") and "broken" in broken.json()["error"]
        assert refusal(gone) == (404, "adapter_not_found") and "upload it again" in gone.json()["error"]
        assert refusal(merged) == (422, "adapter_invalid") and "of-broken" in merged.json()["error"]
        assert whole.status_code == 200
        for name in ("broken", "gone"):
            assert (await server.http.get(f"/adapters/{name}")).json()["versions"][0]["error"]
        await upload(server, world, "gone", 2)
        assert (await server.generate(adapter_id="gone")).status_code == 200

    serve(world, first)
    for folder in (world.folder / "state" / "complete").iterdir():
        match (folder / "adapter_config.json").read_bytes():
            case content if content == world.files(1)["adapter_config.json"]:
                damaged(folder / "adapter_model.safetensors")
            case content if content == world.files(2)["adapter_config.json"]:
                shutil.rmtree(folder)
    serve(world, second)


def test_a_damaged_record_is_never_another_adapter_and_others_serve(world: AdapterWorld) -> None:
    """The name could be one of the hub, where anybody might have put something."""
    world.publish("acme/legal", 4)
    world.publish("acme/other", 2)

    async def first(server: TestServer) -> None:
        await upload(server, world, "acme/legal", 1)
        await upload(server, world, "whole", 2)

    async def second(server: TestServer) -> None:
        for name in ("acme/legal", "acme/legal@1"):
            answer = await server.generate(adapter_id=name)
            assert refusal(answer) == (424, "adapter_unavailable") and "register it again" in answer.json()["error"]
        await served(server, "whole", "acme/other")

    async def third(server: TestServer) -> None:
        await second(server)  # a start has not made it an unknown name
        await upload(server, world, "acme/legal", 8)
        await served(server, "acme/legal")

    serve(world, first)
    file = adapter_state._file_of("acme/legal")
    assert file != adapter_state._file_of("whole")
    damaged(world.folder / "state" / "names" / file)
    serve(world, second, dynamic_adapters=True)
    serve(world, third, dynamic_adapters=True)
    serve(world, lambda server: served(server, "acme/legal"), dynamic_adapters=True)


def test_a_change_that_cannot_be_written_down_is_not_made(world: AdapterWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    async def test(server: TestServer) -> None:
        await upload(server, world, "a", 1)
        before = await names(server), sorted((world.folder / "state" / "complete").iterdir())
        with monkeypatch.context() as patch:
            patch.setattr(adapter_state, "_replace", full)
            files = [("file", item) for item in world.files(2).items()]
            for answer in [
                await server.http.put("/adapters/a", files=files),
                await server.http.put("/adapters/b", files=files),
                await server.http.put("/adapters/a", json={"pinned": True}),
                await server.http.delete("/adapters/a"),
                await merge(server, "m", "a"),
            ]:
                assert refusal(answer) == (424, "adapter_unavailable"), answer.text
                assert "No space left on device" in answer.json()["error"]
        assert (await names(server), sorted((world.folder / "state" / "complete").iterdir())) == before
        assert (await server.http.delete("/adapters/a")).status_code == 204

    serve(world, test)


def test_ten_thousand_names_are_there_without_looking_at_one(
    world: AdapterWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: dict[Path, bytes] = {}
    for number in range(10_000):
        location = AdapterLocation("hub", f"acme/customer-{number:05d}", None, by_operator=True)
        origin = AdapterOrigin(location=location, digest=f"{number:064x}", revision="c" * 40, store_key="5" * 40)
        kept = KeptName(
            name=f"customer-{number:05d}", versions=(KeptVersion(version="1", origin=origin),), split={"1": 1.0}
        )
        file = world.folder / "state" / "names" / adapter_state._file_of(kept.name)
        written[file] = written.get(file, b"") + adapter_state._line(msgspec.json.encode(kept))
    for file, content in written.items():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    took: list[float] = []

    def timed_restore(state: AdapterState, registry: AdapterRegistry) -> None:
        started = time.perf_counter()
        restore(state, registry)
        took.append(time.perf_counter() - started)

    restore = adapter_finder._restore
    monkeypatch.setattr(adapter_finder, "_restore", timed_restore)

    async def test(server: TestServer) -> None:
        assert len((await server.http.get("/v1/models")).json()["data"]) == 10_000 + 3
        one = (await server.http.get("/adapters/customer-07123")).json()["versions"][0]
        assert (one["digest"], one["tier"]) == (f"{7123:064x}", None)
        assert world.hub.requests == []

    serve(world, test)
    print(f"restored in {took[0]:.3f} s")


class Watched:
    """`os`, with a copy of a folder made now and then between two changes of it, as a kill would leave it."""

    def __init__(self, copy: Callable[[], None]):
        self._copy = copy
        self._lock = threading.Lock()  # files are removed in other threads

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def write(self, file: int, data: bytes) -> int:
        with self._lock:
            written = os.write(file, data[: max(1, len(data) // 2)])  # a kill may come after any byte
            self._copy()
            return written

    def replace(self, old: Path, new: Path) -> None:
        with self._lock:
            self._copy()
            os.replace(old, new)
            self._copy()

    def rename(self, old: Path, new: Path) -> None:
        with self._lock:
            self._copy()
            os.rename(old, new)
            self._copy()


def test_a_kill_at_any_point_leaves_the_state_before_a_change_or_after_it(
    world: AdapterWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    chance, chance_of_copy = random.Random(11), random.Random(12)
    folder = world.folder / "state"
    copies: list[int] = []  # the number of the change in which each was made
    states: list[State] = []  # before the first change, and after each
    said: dict[str, str] = {}  # by the digest, or those of the parts

    def copy() -> None:
        if chance_of_copy.random() < 0.08:
            copied = world.folder / f"copy-{len(copies)}"
            # What was to be put together or thrown away is never looked at again.
            shutil.copytree(folder, copied, ignore=shutil.ignore_patterns("staging"))
            copies.append(len(states) - 1)

    async def note(server: TestServer) -> None:
        state = await names(server)
        for one, text in (await answers(server)).items():
            name, _, version = one.rpartition("@")
            said[str(state[name][0][version])] = text
        states.append(state)

    async def first(server: TestServer) -> None:
        await note(server)
        for _ in range(24):
            await change(server, world, chance)
            await until_nothing_is_left_over(server, folder)
            await note(server)

    def check(number: int, change: int) -> None:
        copied = world.folder / f"copy-{number}"

        async def test(server: TestServer) -> None:
            found = await names(server)
            assert found in (states[change], states[change + 1])
            for one, text in (await answers(server)).items():
                name, _, version = one.rpartition("@")
                assert text == said[str(found[name][0][version])], one
            await until_nothing_is_left_over(server, copied)

        serve(world, test, copied)

    with monkeypatch.context() as patch:
        patch.setattr(adapter_state, "os", Watched(copy))
        patch.setattr(adapter_store, "os", Watched(copy))
        serve(world, first, folder)
    assert len(copies) >= 5 and len(states) == 25
    for number, at in enumerate(copies):
        check(number, at)


async def until_nothing_is_left_over(server: TestServer, folder: Path) -> None:
    """Files are removed in a thread of their own."""
    async with asyncio.timeout(30):
        while any(server.state.adapters.let_go(path.name) for path in folder.glob("complete/*")):
            await asyncio.sleep(0.005)


async def change(server: TestServer, world: AdapterWorld, chance: random.Random) -> None:
    """One change of one name, whether or not it can be made now."""
    name = chance.choice("abc")
    match chance.randrange(6):
        case 0 | 1:
            query = chance.choice([{}, {}, {"version": "x", "activate": chance.choice(("true", "false"))}])
            await upload(server, world, name, chance.choice((1, 2, 3)), **query)
        case 2:
            await merge(server, "m", *chance.sample("abc", 2))
        case 3:
            versions = (await names(server)).get(name, ({}, {}, False))[0]
            shares = {version: chance.choice((1, 2, 3)) for version in versions}
            await server.http.put(f"/adapters/{name}", json={"split": shares})
        case 4:
            await server.http.put(f"/adapters/{name}", json={"pinned": chance.choice((True, False))})
        case _:
            await server.http.delete(f"/adapters/{chance.choice((name, name + '@x', 'm', 'pirate'))}")
