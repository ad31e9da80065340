"""The group «adapter» of the faults that a server must withstand: files, sources, cache. The numbers are the rows'.

Rows that other files hold: 17 test_adapter_files_gone.py, 22 test_fairness.py, 24 test_adapter_manager.py, 18 and 19
test_lora_adapter_routes.py, 23 and 26 test_dynamic_adapters.py.
"""

import asyncio
import errno
import json
import logging
import os
import pickle
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_files import CONFIG_FILE, WEIGHTS_FILE, config_fields, lora_tensors, write_adapter
from adapter_world import AdapterWorld, refusal, world
from broken_adapters import BROKEN, make_broken
from hub_stand_in import Repository
from scripted_engine import TestServer

from loraplex_server import adapter_fetcher

__all__ = ["world"]


# Where paths are noted while a test looks at them: a hook stays for as long as its process.
_watchers: list[list[str]] = []


@pytest.fixture(scope="module")
def audit_hook() -> None:
    def note(event: str, details: tuple[Any, ...]) -> None:
        if _watchers and event == "open":
            _watchers[-1].append(str(details[0]))

    sys.addaudithook(note)


@pytest.fixture
def opened(audit_hook: None) -> Iterator[list[str]]:
    """The paths of all files that are opened during a test."""
    _watchers.append([])
    yield _watchers[-1]
    _watchers.clear()


async def base_answers(server: TestServer) -> None:
    answer = await server.generate()
    assert (answer.status_code, answer.json()["generated_text"]) == (200, "hello world")


# 01, 16, 20: names


def test_01_an_unknown_name_is_404_with_near_names_and_never_the_base(world: AdapterWorld) -> None:
    async def test(server: TestServer) -> None:
        answer = await server.generate(adapter_id="pirat")
        assert refusal(answer) == (404, "adapter_not_found")
        assert "near names: pirate" in answer.json()["error"]
        assert world.engine.requests == []

    world.serve(test, dynamic_adapters=False)


@pytest.mark.parametrize("source", [None, "hub", "local", "s3"])
@pytest.mark.parametrize(
    "adapter_id",
    ["../x", "a/../../b", "~root", "%2e%2e/x", "a\\b", "a\0b", "x" * 10_000, "-", ".", "a//b", "a/./b"],
)
def test_16_what_could_lead_out_of_a_folder_is_no_name(
    world: AdapterWorld, adapter_id: str, source: str | None
) -> None:
    async def test(server: TestServer) -> None:
        answer = await server.generate(adapter_id=adapter_id, adapter_source=source)
        assert refusal(answer) == (422, "validation"), answer.text
        assert len(answer.text) < 1000

    world.serve(test)
    assert world.hub.requests == []


@pytest.mark.parametrize("place", ["/etc", "/", "link", "team/link", "file-link"])
def test_16_nothing_outside_the_roots_is_opened(world: AdapterWorld, place: str, opened: list[str]) -> None:
    outside = write_adapter(world.folder / "outside")
    (world.root / "link").symlink_to(outside)
    (world.root / "team").mkdir()
    (world.root / "team" / "link").symlink_to("../../outside")
    shutil.copytree(outside, world.root / "file-link")
    (world.root / "file-link" / WEIGHTS_FILE).unlink()
    (world.root / "file-link" / WEIGHTS_FILE).symlink_to(outside / WEIGHTS_FILE)
    opened.clear()

    async def test(server: TestServer) -> None:
        answers = []
        for adapter_id in (place, "nothing", str(world.root / place.lstrip("/")), str(outside)):
            answers.append(await server.generate(adapter_id=adapter_id, adapter_source="local"))
        assert {refusal(answer) for answer in answers[1:]} == {(404, "adapter_not_found")}
        assert answers[0].status_code in (404, 422)
        if place not in ("/etc", "/"):
            # What lies outside is not told from what is not there.
            assert answers[0].json()["error"].replace(place, "X") == answers[1].json()["error"].replace("nothing", "X")

    world.serve(test)
    assert not [path for path in opened if path.startswith((str(outside), "/etc/adapter"))]


def test_16_without_roots_no_folder_can_be_named(world: AdapterWorld) -> None:
    folder = world.place("legal")

    async def test(server: TestServer) -> None:
        for adapter_id in ("legal", str(folder)):
            answer = await server.generate(adapter_id=adapter_id, adapter_source="local")
            assert refusal(answer) == (404, "adapter_not_found")
            assert "--adapter-root" in answer.json()["error"]

    world.serve(test, adapter_root=())


def test_20_a_revision_is_pinned_to_its_commit_and_an_unknown_one_is_404(world: AdapterWorld) -> None:
    repository = world.publish("acme/pirate", revisions=("main", "v2"))
    first = repository.commit

    async def test(server: TestServer) -> None:
        for adapter_id in ("acme/pirate@v2", f"acme/pirate@{first}", "acme/pirate"):
            assert (await server.generate(adapter_id=adapter_id)).status_code == 200
        for adapter_id in ("acme/pirate@v3", f"acme/pirate@{first[:7]}"):
            assert refusal(await server.generate(adapter_id=adapter_id)) == (404, "adapter_not_found")
        [old] = world.digests()
        repository.files = world.files(8)
        assert repository.commit != first
        # The branch has moved on; what was loaded stays, and says what it is.
        await server.generate(adapter_id="acme/pirate@v2")
        assert world.engine.requests[-1].adapter_digest == old
        one = (await server.http.get("/adapters/acme/pirate@v2")).json()["versions"][0]
        assert one["revision"] == first
        assert (await server.http.delete("/adapters/acme/pirate@v2")).status_code == 204
        await server.generate(adapter_id="acme/pirate@v2")
        assert world.engine.requests[-1].adapter_digest != old
        one = (await server.http.get("/adapters/acme/pirate@v2")).json()["versions"][0]
        assert one["revision"] == repository.commit

    world.serve(test, allow_runtime_adapters=True)


# 02 to 05, 25: sources and the disk


def test_02_a_repository_that_is_not_there_is_404_and_a_flood_asks_once(world: AdapterWorld) -> None:
    async def test(server: TestServer) -> None:
        for _ in range(30):
            assert refusal(await server.generate(adapter_id="acme/nothing")) == (404, "adapter_not_found")
        assert len(world.hub.requests) == 1
        server.state.adapters._fetcher._clock = lambda: time.monotonic() + adapter_fetcher.REFUSAL_TTL_S + 1
        world.publish("acme/nothing")
        assert (await server.generate(adapter_id="acme/nothing")).status_code == 200

    world.serve(test)


@pytest.mark.parametrize("token", [None, "wrong-token"])
@pytest.mark.parametrize("settings", [{"gated": True, "token": "right"}, {"token": "right"}])
def test_03_what_the_hub_forbids_is_403_and_says_what_is_missing(
    world: AdapterWorld, settings: dict[str, Any], token: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    world.publish("acme/gated", **settings)

    async def test(server: TestServer) -> None:
        answer = await server.generate(adapter_id="acme/gated", api_token=token)
        assert refusal(answer) == (403, "adapter_forbidden")
        assert "token" in answer.json()["error"] and ("api_token" in answer.text) == (token is None)
        assert "wrong-token" not in answer.text
        assert (await server.generate(adapter_id="acme/gated", api_token="right")).status_code == 200

    with caplog.at_level(logging.DEBUG):
        world.serve(test)
    assert "wrong-token" not in caplog.text


@pytest.mark.parametrize("fault", [500, 503, 429, "down", "unknown host", "offline"])
def test_04_a_hub_in_trouble_is_424_and_what_is_here_keeps_serving(world: AdapterWorld, fault: int | str) -> None:
    world.publish("acme/here")
    settings: dict[str, Any] = {}

    async def test(server: TestServer) -> None:
        if fault == "offline":
            answer = await server.generate(adapter_id="acme/new")
            assert world.hub.requests == []
        else:
            assert (await server.generate(adapter_id="acme/here")).status_code == 200
            if isinstance(fault, int):
                world.hub.status = fault
            else:
                port = "http://127.0.0.1:9" if fault == "down" else "http://nowhere.invalid"
                object.__setattr__(server.state.adapters._intake._config, "hub_endpoint", port)
            answer = await server.generate(adapter_id="acme/new")
            assert (await server.generate(adapter_id="acme/here")).status_code == 200
        assert refusal(answer) == (424, "adapter_unavailable")
        assert int(answer.headers["retry-after"]) >= 1
        await base_answers(server)

    if fault == "offline":
        settings["hub_offline"] = True
    world.serve(test, **settings)


def test_04_a_transfer_that_trickles_ends_at_the_timeout_and_goes_on_next_time(world: AdapterWorld) -> None:
    world.publish("acme/slow")
    world.hub.piece_pause_s = 0.3  # 3 kB a second

    async def test(server: TestServer) -> None:
        arrived = 0
        while not arrived:  # on a busy machine a second may be over before the weights begin to come
            server.state.adapters._fetcher._refusals.clear()
            slow = asyncio.create_task(server.generate(adapter_id="acme/slow"))
            while not (world.hub.downloaded() or slow.done()):
                await asyncio.sleep(0.01)
            await base_answers(server)
            answer = await slow
            assert refusal(answer) == (424, "adapter_unavailable")
            assert "--adapter-fetch-timeout" in answer.json()["error"]
            while world.left_behind() or list(world.cache.glob("staging/*")):
                await asyncio.sleep(0.01)
            arrived = sum(part.stat().st_size for part in world.cache.glob("parts/*"))
        assert arrived < len(world.files()[WEIGHTS_FILE])
        world.hub.piece_pause_s = 0
        world.hub.requests.clear()
        server.state.adapters._fetcher._clock = lambda: time.monotonic() + adapter_fetcher.UNAVAILABLE_TTL_S + 1
        assert (await server.generate(adapter_id="acme/slow")).status_code == 200
        assert arrived in world.hub.resumed_at

    world.serve(test, adapter_fetch_timeout=1)


def test_05_a_download_that_is_cut_resumes_and_is_never_taken_for_complete(world: AdapterWorld) -> None:
    world.publish("acme/cut")
    world.hub.cut_downloads_at = 2000

    async def test(server: TestServer) -> None:
        assert (await server.generate(adapter_id="acme/cut")).status_code == 200

    world.serve(test)
    assert len(world.hub.resumed_at) >= 2


def test_05_a_hub_that_never_sends_more_is_given_up(world: AdapterWorld) -> None:
    world.publish("acme/cut")
    world.hub.cut_downloads_at = 0

    async def test(server: TestServer) -> None:
        answer = await server.generate(adapter_id="acme/cut")
        assert refusal(answer) == (424, "adapter_unavailable") and "cut at 0" in answer.json()["error"]
        assert list(world.cache.glob("complete/*")) == []

    world.serve(test)


def test_05_what_a_killed_process_left_is_used_or_removed(world: AdapterWorld) -> None:
    repository = world.publish("acme/cut")
    world.hub.cuts = [10_000, 1500, 0, 0, 0]  # the config, a piece of the weights, and then nothing

    async def stop_half_way(server: TestServer) -> None:
        assert refusal(await server.generate(adapter_id="acme/cut")) == (424, "adapter_unavailable")
        [part] = world.cache.glob("parts/*")
        assert part.stat().st_size == 1500

    world.serve(stop_half_way)
    left = world.cache / "staging" / "999999999-0"
    left.mkdir(parents=True)
    (left / CONFIG_FILE).write_bytes(b"half")
    world.engine = type(world.engine)()

    async def again(server: TestServer) -> None:
        assert (await server.generate(adapter_id="acme/cut")).status_code == 200
        assert world.hub.resumed_at[-1] == 1500
        assert list(world.cache.glob("staging/*")) == list(world.cache.glob("parts/*")) == []
        [folder] = world.cache.glob("complete/*")
        assert {file.name: file.read_bytes() for file in folder.iterdir()} == repository.files

    world.serve(again)


def test_05_a_large_file_that_arrives_damaged_is_thrown_away(world: AdapterWorld) -> None:
    world.publish("acme/damaged", lfs=True)
    world.hub.damage_downloads = True

    async def test(server: TestServer) -> None:
        answer = await server.generate(adapter_id="acme/damaged")
        assert refusal(answer) == (424, "adapter_unavailable") and "damaged" in answer.json()["error"]
        assert list(world.cache.glob("complete/*")) == []

    world.serve(test)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS])
def test_25_a_disk_that_refuses_is_424_and_leaves_nothing(
    world: AdapterWorld, code: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    world.publish("acme/pirate")
    replace = os.replace

    def refuse(source: Any, target: Any) -> None:
        if "staging" in str(target):
            raise OSError(code, os.strerror(code))
        replace(source, target)

    monkeypatch.setattr(os, "replace", refuse)

    async def test(server: TestServer) -> None:
        answer = await server.generate(adapter_id="acme/pirate")
        assert refusal(answer) == (424, "adapter_unavailable")
        assert str(world.cache) not in answer.text
        await base_answers(server)
        assert (await server.http.get("/health")).status_code == 200
        assert list(world.cache.glob("staging/*")) == list(world.cache.glob("complete/*")) == []

    world.serve(test)
    assert str(world.cache) in caplog.text


def test_25_a_cache_that_cannot_be_made_is_424(world: AdapterWorld) -> None:
    world.publish("acme/pirate")
    (world.folder / "file").write_bytes(b"")

    async def test(server: TestServer) -> None:
        assert refusal(await server.generate(adapter_id="acme/pirate")) == (424, "adapter_unavailable")
        await base_answers(server)

    world.serve(test, adapter_cache=str(world.folder / "file" / "cache"))


def test_25_the_longest_unused_adapter_gives_way_and_one_in_use_does_not(world: AdapterWorld) -> None:
    size = 400_000
    for name in ("one", "two", "three"):
        # Padding that counts on the disk and means nothing.
        world.hub.repositories[f"acme/{name}"] = Repository(world.files() | {CONFIG_FILE: padded_config(name, size)})

    async def test(server: TestServer) -> None:
        for name in ("one", "two"):
            assert (await server.generate(adapter_id=f"acme/{name}")).status_code == 200
        first = next(world.cache.glob("complete/*"))
        for folder in world.cache.glob("complete/*"):
            os.utime(folder, (folder.stat().st_mtime - 100,) * 2 if padded("one", folder) else None)
            first = folder if padded("one", folder) else first
        assert (await server.generate(adapter_id="acme/three")).status_code == 200
        assert not first.exists() and len(list(world.cache.glob("complete/*"))) == 2
        await server.settled()
        assert len(world.digests()) == 2
        assert (await server.generate(adapter_id="acme/one")).status_code == 200  # it is fetched again

    world.serve(test, adapter_cache_mb=1)


def test_25_a_budget_that_is_in_use_refuses_and_says_so_in_the_log(
    world: AdapterWorld, caplog: pytest.LogCaptureFixture
) -> None:
    world.hub.repositories["acme/one"] = Repository(world.files() | {CONFIG_FILE: padded_config("one", 700_000)})
    world.hub.repositories["acme/two"] = Repository(world.files() | {CONFIG_FILE: padded_config("two", 700_000)})
    world.engine.gate, world.engine.gate_at = asyncio.Event(), 1

    async def test(server: TestServer) -> None:
        running = asyncio.create_task(server.generate(adapter_id="acme/one"))
        while not world.engine.requests:
            await asyncio.sleep(0.005)
        assert refusal(await server.generate(adapter_id="acme/two")) == (424, "adapter_unavailable")
        world.engine.gate.set()
        assert (await running).status_code == 200

    world.serve(test, adapter_cache_mb=1)
    assert "--adapter-cache-mb" in caplog.text


def padded_config(name: str, size: int) -> bytes:
    return json.dumps(config_fields(base_model_name_or_path=f"acme/{name}" + " " * size)).encode()


def padded(name: str, folder: Path) -> bool:
    return f"acme/{name} ".encode() in (folder / CONFIG_FILE).read_bytes()


# 06 to 12, 14, 15: files


@pytest.mark.parametrize("kind", BROKEN, ids=lambda kind: f"{BROKEN[kind].row} {kind}")
def test_06_to_14_a_broken_adapter_is_refused_by_name_and_costs_nobody_else(world: AdapterWorld, kind: str) -> None:
    broken = make_broken(kind, world.root / "broken")

    async def test(server: TestServer) -> None:
        used = await server.generate(adapter_id="broken")
        registered = await server.http.post("/adapters", json={"name": "mine", "id": "broken"})
        for answer in (used, registered):
            assert refusal(answer) == (422, broken.error_type), answer.text
            for word in broken.words:
                assert word in answer.json()["error"]
            assert str(world.folder) not in answer.text
            assert len(answer.text) < 2000
        await base_answers(server)
        assert world.digests() == []
        assert refusal(await server.generate(adapter_id="mine")) == (404, "adapter_not_found")

    world.serve(test, allow_runtime_adapters=True)


class _Malicious:
    def __init__(self, path: Path):
        self._path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self._path,)


@pytest.mark.parametrize("is_trusted", [False, True])
def test_08_a_malicious_pickle_never_runs(world: AdapterWorld, is_trusted: bool) -> None:
    ran = world.folder / "it ran"
    make_broken("only a pickle", world.root / "evil")
    (world.root / "evil" / "adapter_model.bin").write_bytes(pickle.dumps({"a": _Malicious(ran)}))

    async def test(server: TestServer) -> None:
        answer = await server.generate(adapter_id="evil")
        assert refusal(answer) == (422, "adapter_invalid" if is_trusted else "adapter_unsupported"), answer.text
        assert str(world.folder) not in answer.text
        assert not ran.exists()
        assert world.left_behind() == []
        await base_answers(server)

    world.serve(test, trust_pickle_adapters=is_trusted)


def test_08_a_plain_pickle_is_served_where_the_operator_trusts_it(world: AdapterWorld) -> None:
    make_broken("only a pickle", world.root / "old")
    torch.save(lora_tensors(), world.root / "old" / "adapter_model.bin")
    world.hub.repositories["acme/old"] = Repository(
        {file.name: file.read_bytes() for file in (world.root / "old").iterdir()}
    )

    async def test(server: TestServer) -> None:
        for adapter_id in ("old", "acme/old"):
            answer = await server.generate(adapter_id=adapter_id)
            assert answer.status_code == 200, answer.text
        assert all(Path(spec.path).is_relative_to(world.cache) for spec in world.engine.adapters.values())

    world.serve(test, trust_pickle_adapters=True)


@pytest.mark.parametrize("base", [None, "someone/private-model", "/home/trainer/model", "https://example.com/model"])
def test_13_the_base_that_an_adapter_names_is_never_fetched_or_opened(
    world: AdapterWorld, base: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    write_adapter(world.root / "legal", config_fields(base_model_name_or_path=base))

    async def test(server: TestServer) -> None:
        assert (await server.generate(adapter_id="legal")).status_code == 200

    world.serve(test)
    assert world.hub.requests == []
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len([warning for warning in warnings if "'legal'" in warning]) == 1


@pytest.mark.parametrize(("rank", "max_rank", "status"), [(1, 512, 200), (256, 512, 200), (256, 255, 422)])
def test_15_a_rank_is_served_up_to_the_limit_and_the_refusal_names_the_flag(
    world: AdapterWorld, rank: int, max_rank: int, status: int
) -> None:
    world.place("legal", rank)

    async def test(server: TestServer) -> None:
        answer = await server.generate(adapter_id="legal")
        assert answer.status_code == status
        if status == 422:
            assert refusal(answer) == (422, "adapter_too_large")
            assert f"--max-lora-rank {rank}" in answer.json()["error"] and "bytes" in answer.json()["error"]

    world.serve(test, max_lora_rank=max_rank)


def test_15_files_above_the_size_limit_are_refused_before_they_are_fetched(world: AdapterWorld) -> None:
    world.hub.repositories["acme/large"] = Repository(world.files() | {WEIGHTS_FILE: b"x" * (2**20 + 1)})

    async def test(server: TestServer) -> None:
        answer = await server.generate(adapter_id="acme/large")
        assert refusal(answer) == (422, "adapter_too_large") and "--max-adapter-mb" in answer.json()["error"]

    world.serve(test, max_adapter_mb=1)
    assert not any(line.startswith("GET /acme") for line in world.hub.requests)


# 21, 27, 28: many, extras, and folders that are gone


def test_21_ten_thousand_registered_names_cost_little(world: AdapterWorld) -> None:
    names = [f"customer-{i:05d}" for i in range(10_000)]
    listed = world.folder / "list"
    listed.write_text("".join(f"{name}={world.root / name}\n" for name in names))
    world.place(names[1234])

    async def test(server: TestServer) -> None:
        models = (await server.http.get("/v1/models")).json()["data"]
        assert len(models) == 10_003 and world.digests() == []
        assert (await server.generate(adapter_id=names[1234])).status_code == 200
        assert len(world.digests()) == 1
        assert (await server.http.get("/metrics")).text.count("customer-") < 10

    world.serve(test, adapter_list=str(listed), dynamic_adapters=False, adapter_root=())


def test_27_tokenizers_templates_and_hints_to_code_are_not_used(
    world: AdapterWorld, caplog: pytest.LogCaptureFixture
) -> None:
    folder = world.root / "legal"
    write_adapter(folder, config_fields(auto_mapping={"base_model_class": "x", "parent_library": "antigravity"}))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "chat_template.jinja").write_text("{{ boom() }}")
    (folder / "modeling_custom.py").write_text("raise SystemExit")

    async def test(server: TestServer) -> None:
        assert (await server.generate(adapter_id="legal")).status_code == 200

    world.serve(test)
    assert "antigravity" not in sys.modules
    assert "chat_template.jinja" in caplog.text and "tokenizer.json" in caplog.text


def test_28_a_registered_adapter_whose_folder_is_gone_fails_alone(
    world: AdapterWorld, caplog: pytest.LogCaptureFixture
) -> None:
    world.place("legal")
    (world.folder / "list").write_text(f"gone={world.root / 'gone'}\nlegal={world.root / 'legal'}\n")

    async def test(server: TestServer) -> None:
        answer = await server.generate(adapter_id="gone")
        assert refusal(answer) == (404, "adapter_not_found") and "'gone'" in answer.json()["error"]
        assert str(world.root) not in answer.text
        assert (await server.generate(adapter_id="legal")).status_code == 200
        shown = (await server.http.get("/adapters/gone")).json()["versions"][0]
        assert "folder is gone" in shown["error"]

    world.serve(test, adapter_list=str(world.folder / "list"), dynamic_adapters=False)
    assert str(world.root / "gone") in caplog.text
