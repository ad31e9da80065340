"""Our own routes: the list, registering by source, uploads, versions, splits, pins, and what they refuse."""

import asyncio
from collections import Counter
from typing import Any

import httpx
import pytest
from adapter_world import AdapterWorld, refusal, world
from scripted_engine import DEADLINE_S, TestServer

from loraplex_server.messages import AdapterStatus, LoadAdapter

__all__ = ["world"]

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


async def upload(server: TestServer, name: str, files: dict[str, bytes], **query: str) -> httpx.Response:
    parts = [("file", (file, content)) for file, content in files.items()]
    answer = await server.http.put(f"/adapters/{name}", files=parts, params=query)
    await server.settled()
    return answer


async def shown(server: TestServer, name: str) -> dict[str, Any]:
    return (await server.http.get(f"/adapters/{name}")).json()


async def say(server: TestServer, name: str, **more: Any) -> str:
    answer = await server.generate(adapter_id=name, **more)
    return answer.json()["generated_text"] if answer.status_code == 200 else answer.json()["error_type"]


def stored(world: AdapterWorld) -> list[str]:
    """Everything in the store's folders."""
    return sorted(str(path) for path in world.cache.glob("*/*"))


# Registering by source


def test_a_name_is_registered_by_its_source_and_listed(world: AdapterWorld) -> None:
    repository = world.publish("acme/legal")

    async def test(server: TestServer) -> None:
        answer = await server.http.post("/adapters", json={"name": "legal", "id": "acme/legal", "pin": True})
        await server.settled()
        assert answer.status_code == 200, answer.text
        [digest] = world.digests()
        await say(server, "legal")
        listed = (await server.http.get("/adapters")).json()["adapters"]
        assert [one["name"] for one in listed] == ["pirate", "json", "legal"]
        one = await shown(server, "legal")
        assert listed[-1] == one
        assert (one["pinned"], one["dynamic"], one["error"]) == (True, False, None)
        assert one["last_used"] > 0
        assert one["versions"] == [
            {
                "version": "1", "share": 1.0, "source": "hub", "id": "acme/legal", "revision": repository.commit,
                "digest": digest, "rank": 4, "num_bytes": world.engine.adapters[digest].num_bytes, "tier": "disk",
                "host_bytes": 0, "device_bytes": 0, "num_requests": 1, "error": None,
            }
        ]  # fmt: skip

    world.serve(test, allow_runtime_adapters=True, dynamic_adapters=False)


def test_without_preload_files_are_brought_on_the_first_use(world: AdapterWorld) -> None:
    world.publish("acme/legal")

    async def test(server: TestServer) -> None:
        await server.http.post("/adapters", json={"name": "legal", "id": "acme/legal", "preload": False})
        assert (await shown(server, "legal"))["versions"][0]["digest"] is None
        assert world.hub.requests == []
        assert (await say(server, "legal")).startswith("<")
        assert (await shown(server, "legal"))["versions"][0]["digest"] == world.digests()[0]

    world.serve(test, allow_runtime_adapters=True, dynamic_adapters=False)


def test_sagemakers_names_mean_the_same(world: AdapterWorld) -> None:
    world.place("legal")

    async def test(server: TestServer) -> None:
        body = {"name": "l", "src": str(world.root / "legal"), "preload": True, "pin": False}
        assert (await server.http.post("/adapters", json=body)).status_code == 200
        assert (await say(server, "l")).startswith("<")
        assert (await server.http.delete("/adapters/l")).status_code == 204
        assert await say(server, "l") == "adapter_not_found"
        assert (await server.http.delete("/adapters/l")).status_code == 404

    world.serve(test, allow_runtime_adapters=True, dynamic_adapters=False)


def test_an_operators_adapter_may_be_private_and_is_then_for_all(world: AdapterWorld) -> None:
    world.publish("acme/secret", private=True, token="operators")

    async def test(server: TestServer) -> None:
        assert (await server.http.post("/adapters", json={"name": "s", "id": "acme/secret"})).status_code == 200
        assert (await say(server, "s")).startswith("<")

    world.serve(test, allow_runtime_adapters=True, dynamic_adapters=False, hub_token="operators")


def test_a_fetched_adapter_is_listed_and_can_be_deleted(world: AdapterWorld) -> None:
    world.publish("acme/pirate")

    async def test(server: TestServer) -> None:
        await say(server, "acme/pirate")
        one = await shown(server, "acme/pirate")
        assert one["dynamic"] and one["versions"][0]["num_requests"] == 1
        assert (await server.http.delete("/adapters/acme/pirate")).status_code == 204
        await server.settled()
        assert world.digests() == []

    world.serve(test, allow_runtime_adapters=True)


# Uploads


def test_uploaded_files_are_served_and_deleted_with_the_adapter(world: AdapterWorld) -> None:
    files = world.files()

    async def test(server: TestServer) -> None:
        answer = await upload(server, "mine", files)
        assert answer.status_code == 200, answer.text
        assert answer.json()["versions"][0]["source"] == "upload"
        [digest] = world.digests()
        assert await say(server, "mine") == f"<{digest[:12]}>"
        assert world.left_behind() == [] and len(stored(world)) == 1
        assert (await server.http.delete("/adapters/mine")).status_code == 204
        await server.settled()
        assert world.digests() == []
        async with asyncio.timeout(DEADLINE_S):
            while stored(world):
                await asyncio.sleep(0.01)

    world.serve(test, allow_runtime_adapters=True, dynamic_adapters=False)


def test_an_upload_may_be_larger_than_other_bodies(world: AdapterWorld) -> None:
    async def test(server: TestServer) -> None:
        assert (await upload(server, "mine", world.files())).status_code == 200
        answer = await server.http.put("/adapters/mine", json={"active": "x" * 3000})
        assert refusal(answer) == (413, "payload_too_large")

    world.serve(test, allow_runtime_adapters=True, payload_limit=2000)


BAD_UPLOADS = {
    "no weights": (lambda files: {CONFIG: files[CONFIG]}, 422, "validation", f"no {WEIGHTS}"),
    "no config": (lambda files: {WEIGHTS: files[WEIGHTS]}, 422, "validation", f"no {CONFIG}"),
    "an archive": (lambda files: {"adapter.zip": b"PK\3\4"}, 422, "validation", "adapter.zip"),
    "a path": (lambda files: files | {f"../{CONFIG}": b"{}"}, 422, "validation", "nothing else"),
    "an absolute path": (lambda files: files | {"/etc/cron.d/x": b"{}"}, 422, "validation", "nothing else"),
    "a pickle": (lambda files: files | {"adapter_model.bin": b"x"}, 422, "validation", "adapter_model.bin"),
    "a truncated file": (lambda files: files | {WEIGHTS: files[WEIGHTS][:-100]}, 422, "adapter_invalid", "cut off"),
    "a broken config": (lambda files: files | {CONFIG: b"{"}, 422, "adapter_invalid", CONFIG),
    "an empty file": (lambda files: files | {WEIGHTS: b""}, 422, "adapter_invalid", "0 bytes"),
    "too large": (lambda files: files | {WEIGHTS: b"\0" * 2**20}, 413, "payload_too_large", "--max-adapter-mb"),
}


@pytest.mark.parametrize("kind", BAD_UPLOADS)
def test_a_bad_upload_is_refused_and_leaves_no_file(world: AdapterWorld, kind: str) -> None:
    change, status, error_type, words = BAD_UPLOADS[kind]

    async def test(server: TestServer) -> None:
        answer = await upload(server, "mine", change(world.files()))
        assert refusal(answer) == (status, error_type), answer.text
        assert words in answer.json()["error"]
        assert str(world.folder) not in answer.text
        assert stored(world) == [] and world.digests() == []
        assert await say(server, "mine") == "adapter_not_found"

    world.serve(test, allow_runtime_adapters=True, dynamic_adapters=False, max_adapter_mb=1)


def test_a_file_sent_twice_is_refused(world: AdapterWorld) -> None:
    async def test(server: TestServer) -> None:
        parts = [("file", (CONFIG, b"{}")), ("file", (CONFIG, b"{}"))]
        answer = await server.http.put("/adapters/mine", files=parts)
        assert refusal(answer) == (422, "validation") and "twice" in answer.text
        assert stored(world) == []

    world.serve(test, allow_runtime_adapters=True)


@pytest.mark.parametrize(
    ("content_type", "body", "expected"),
    [
        ("multipart/form-data", b"--x--", (415, "unsupported_media_type")),
        ("multipart/form-data; boundary=x", b"no boundary at all", (400, "invalid_json")),
        ("multipart/form-data; boundary=x", b"--x\r\nContent-Disposition: form-data; fi", (400, "invalid_json")),
        ("multipart/form-data; boundary=x", b"", (400, "invalid_json")),
        ("application/zip", b"PK\3\4", (415, "unsupported_media_type")),
    ],
)  # fmt: skip
def test_a_body_that_is_no_upload_is_refused(
    world: AdapterWorld, content_type: str, body: bytes, expected: tuple[int, str]
) -> None:
    async def test(server: TestServer) -> None:
        answer = await server.http.put("/adapters/mine", content=body, headers={"content-type": content_type})
        assert refusal(answer) == expected, answer.text
        assert stored(world) == []

    world.serve(test, allow_runtime_adapters=True)


def test_an_upload_whose_client_leaves_is_gone(world: AdapterWorld) -> None:
    content = world.files()[WEIGHTS]

    async def test(server: TestServer) -> None:
        head = f'--x\r\nContent-Disposition: form-data; name="f"; filename="{WEIGHTS}"\r\n\r\n'.encode()
        _, writer = await asyncio.open_connection(*server.base_url.removeprefix("http://").split(":"))
        writer.write(
            b"PUT /adapters/mine HTTP/1.1\r\nHost: x\r\nContent-Type: multipart/form-data; boundary=x\r\n"
            b"Content-Length: 1000000\r\n\r\n" + head + content
        )
        await writer.drain()
        async with asyncio.timeout(DEADLINE_S):
            while not world.left_behind() and not (world.cache / "staging").is_dir():
                await asyncio.sleep(0.005)
            writer.close()
            await writer.wait_closed()
            while list(world.cache.glob("staging/*")):
                await asyncio.sleep(0.005)
        assert stored(world) == []

    world.serve(test, allow_runtime_adapters=True, live=True)


# Versions, splits and replacement


def test_versions_are_asked_for_by_name_and_an_alias_chooses_among_them(world: AdapterWorld) -> None:
    async def test(server: TestServer) -> None:
        await upload(server, "m", world.files(4), version="one")
        [one] = world.digests()
        await upload(server, "m", world.files(8), version="two", activate="false")
        [two] = set(world.digests()) - {one}
        assert await say(server, "m") == await say(server, "m@one") == f"<{one[:12]}>"
        assert await say(server, "m@two") == f"<{two[:12]}>"
        answer = await server.http.put("/adapters/m", json={"active": "two"})
        assert [version["share"] for version in answer.json()["versions"]] == [0.0, 1.0]
        assert await say(server, "m") == f"<{two[:12]}>"
        refused = await server.generate(adapter_id="m@three")
        assert refusal(refused) == (404, "adapter_not_found") and "it has one, two" in refused.text
        assert refusal(await server.http.delete("/adapters/m@two")) == (422, "validation")
        assert (await server.http.delete("/adapters/m@one")).status_code == 204
        await server.settled()
        assert world.digests() == [two]

    world.serve(test, allow_runtime_adapters=True, dynamic_adapters=False)


def test_an_upload_without_a_version_replaces_and_running_requests_end_on_the_old_weights(world: AdapterWorld) -> None:
    world.engine.gate, world.engine.gate_at = asyncio.Event(), 3

    async def test(server: TestServer) -> None:
        await upload(server, "m", world.files(4))
        [old] = world.digests()
        running = asyncio.create_task(say(server, "m"))
        while not world.engine.requests:
            await asyncio.sleep(0.005)
        assert [one["version"] for one in (await upload(server, "m", world.files(8))).json()["versions"]] == ["2"]
        later = asyncio.create_task(say(server, "m"))
        while len(world.engine.requests) < 2:
            await asyncio.sleep(0.005)
        world.engine.gate.set()
        assert await running == f"<{old[:12]}>"
        assert await later != f"<{old[:12]}>"
        await server.until_idle()
        assert old not in world.digests()

    world.serve(test, allow_runtime_adapters=True)


def test_a_split_sends_shares_of_the_keys_to_each_version_and_each_key_to_one(world: AdapterWorld) -> None:
    async def test(server: TestServer) -> None:
        await upload(server, "m", world.files(4))
        await upload(server, "m", world.files(8), version="canary", activate="false")
        answer = await server.http.put("/adapters/m", json={"split": {"1": 3, "canary": 1}})
        assert [version["share"] for version in answer.json()["versions"]] == [0.75, 0.25]
        entry = server.state.adapters.registry.resolve("m")
        chosen = {f"user-{i}": entry.choose(f"user-{i}").version for i in range(4000)}
        assert 900 < Counter(chosen.values())["canary"] < 1100
        texts = {version: await say(server, f"m@{version}") for version in ("1", "canary")}
        for user in [*chosen][:10]:
            for _ in range(2):
                answer = await server.http.post(
                    "/v1/completions", json={"model": "m", "prompt": "hi", "user": user, "max_tokens": 30}
                )
                assert answer.json()["choices"][0]["text"] == texts[chosen[user]]
            headers = {"x-adapter-split-key": user}
            body = {"inputs": "hi", "parameters": {"adapter_id": "m"}}
            answer = await server.http.post("/generate", json=body, headers=headers)
            assert answer.json()["generated_text"] == texts[chosen[user]]

    world.serve(test, allow_runtime_adapters=True)


@pytest.mark.parametrize(
    ("change", "status"),
    [
        ({"split": {}}, 422),
        ({"split": {"1": 0}}, 422),
        ({"split": {"1": -1}}, 422),
        ({"split": {"nothing": 1}}, 404),
        ({"active": "nothing"}, 404),
        ({"active": "1", "split": {"1": 1}}, 422),
        ({"pinned": "yes"}, 422),
    ],
)
def test_a_change_that_cannot_be_changes_nothing(world: AdapterWorld, change: dict[str, Any], status: int) -> None:
    async def test(server: TestServer) -> None:
        before = await shown(server, "pirate")
        assert (await server.http.put("/adapters/pirate", json=change)).status_code == status
        assert await shown(server, "pirate") == before
        assert (await server.http.put("/adapters/nobody", json=change)).status_code in (404, 422)

    world.serve(test, allow_runtime_adapters=True)


@pytest.mark.parametrize("name", ["a@b", "%2e%2e", "a/%2e%2e/b", "tiny-base", "~x", "a%5Cb", "x" * 513, "%00"])
def test_what_cannot_be_a_name_is_refused(world: AdapterWorld, name: str) -> None:
    async def test(server: TestServer) -> None:
        answer = await upload(server, name, world.files())
        assert answer.status_code in (404, 422), answer.text
        assert stored(world) == []

    world.serve(test, allow_runtime_adapters=True)


def test_two_changes_of_one_name_come_one_after_the_other(world: AdapterWorld) -> None:
    async def test(server: TestServer) -> None:
        answers = await asyncio.gather(*(upload(server, "m", world.files(rank)) for rank in (4, 8, 16)))
        assert {answer.status_code for answer in answers} == {200}
        assert len((await shown(server, "m"))["versions"]) == 1
        await server.settled()
        assert len(world.digests()) == 1

    world.serve(test, allow_runtime_adapters=True)


# Pins, and what the engine says


def test_a_pinned_adapter_is_kept_ready_through_replacement_and_split(world: AdapterWorld) -> None:
    async def test(server: TestServer) -> None:
        kept = world.engine.kept
        await upload(server, "m", world.files(4), pin="true")
        assert kept == set(world.digests())
        await upload(server, "m", world.files(8))
        assert kept == set(world.digests()) and len(kept) == 1
        await upload(server, "m", world.files(16), version="canary", activate="false")
        assert len(kept) == 1
        await server.http.put("/adapters/m", json={"split": {"2": 1, "canary": 1}})
        await server.settled()
        assert kept == set(world.digests()) and len(kept) == 2
        await server.http.put("/adapters/m", json={"pinned": False})
        await server.settled()
        assert kept == set()
        await server.http.put("/adapters/m", json={"pinned": True})
        await server.http.delete("/adapters/m")
        await server.settled()
        assert kept == set() and world.digests() == []

    world.serve(test, allow_runtime_adapters=True)


def test_the_list_shows_where_the_engine_has_an_adapter(world: AdapterWorld) -> None:
    async def test(server: TestServer) -> None:
        await upload(server, "m", world.files())
        [spec] = world.engine.adapters.values()
        status = AdapterStatus(adapter_id="m", digest=spec.digest, tier="device", num_bytes=30, device_bytes=40)
        world.engine.say(status)
        while (one := (await shown(server, "m"))["versions"][0])["tier"] != "device":
            await asyncio.sleep(0)
        assert (one["tier"], one["host_bytes"], one["device_bytes"]) == ("device", 30, 40)

    world.serve(test, allow_runtime_adapters=True)


def test_a_content_that_the_engine_could_not_load_is_brought_again_by_the_next_request(world: AdapterWorld) -> None:
    folder = world.place("legal", rank=4)

    async def test(server: TestServer) -> None:
        await server.http.post("/adapters", json={"name": "l", "id": "legal"})
        old = await say(server, "l")
        for file, content in world.files(8).items():
            (folder / file).write_bytes(content)
        assert await say(server, "l") == old  # the engine has the old weights
        [spec] = world.engine.adapters.values()
        world.engine.say(AdapterStatus(adapter_id="l", digest=spec.digest, tier="disk", error="its files have changed"))
        while (await shown(server, "l"))["versions"][0]["error"] != "its files have changed":
            await asyncio.sleep(0)
        assert await say(server, "l") not in (old, "generation")
        assert (await shown(server, "l"))["versions"][0]["error"] is None

    world.serve(test, allow_runtime_adapters=True)


def test_a_new_engine_is_told_all_that_is_needed(world: AdapterWorld) -> None:
    async def test(server: TestServer) -> None:
        await upload(server, "m", world.files(4), pin="true")
        await upload(server, "n", world.files(8))
        before = dict(world.engine.adapters), set(world.engine.kept)
        world.engine.adapters.clear()
        world.engine.kept.clear()
        for message in server.state.adapters.meet_new_engine():
            if not isinstance(message, LoadAdapter) or message.spec.source == "upload":
                await world.engine.send(message)
        assert (world.engine.adapters, world.engine.kept) == before

    world.serve(test, allow_runtime_adapters=True)
