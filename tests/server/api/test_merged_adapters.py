"""`merged_adapters` on the routes: what the engine is asked for, and what is refused."""

import asyncio
from pathlib import Path
from typing import Any

import msgspec
import pytest
from scripted_engine import ScriptedEngine, api_server
from tiny_models import make_tiny_llama

BOTH = {"ids": ["pirate", "json"], "weights": [0.5, 2], "merge_strategy": "linear"}


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("merged")
    make_tiny_llama(folder)
    return str(folder)


def test_a_merge_is_made_known_and_answers(model_path: str) -> None:
    async def test() -> None:
        name = "linear(0.5*pirate+2*json)"
        engine = ScriptedEngine(texts={None: "base", "pirate": "arr", name: "both"})
        async with api_server(engine, model_path=model_path) as server:
            for _ in range(2):
                answer = await server.generate(merged_adapters=BOTH)
                assert answer.json() == {"generated_text": "both"}
            chat = {"model": "tiny-base", "messages": [{"role": "user", "content": "hi"}], "merged_adapters": BOTH}
            answer = await server.http.post("/v1/chat/completions", json=chat)
            assert answer.json()["choices"][0]["message"]["content"] == "both"
            assert (await server.generate(adapter_id="pirate")).json() == {"generated_text": "arr"}
            [loaded] = engine.adapters.values()
            assert loaded.merge is not None
            assert loaded.digest == loaded.merge.digest
            assert [(part.digest, part.weight) for part in loaded.merge.parts] == [("d-pirate", 0.5), ("d-json", 2.0)]

    asyncio.run(test())


def test_the_merge_longest_unused_is_forgotten(model_path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loraplex_server.api.adapter_merges.MAX_KEPT", 2)

    async def test() -> None:
        names = {weight: f"linear({weight}*pirate)" for weight in (1, 2, 3)}
        engine = ScriptedEngine(texts={None: "base", "pirate": "arr"} | dict.fromkeys(names.values(), "one"))
        async with api_server(engine, model_path=model_path) as server:
            for weight in names:
                await server.generate(merged_adapters={"ids": ["pirate"], "weights": [weight]})
            await server.settled()
            assert sorted(spec.adapter_id for spec in engine.adapters.values()) == [names[2], names[3]]

    asyncio.run(test())


@pytest.mark.parametrize(
    ("merged", "status", "message"),
    [
        ({"ids": [], "weights": []}, 422, "at least one adapter ID"),
        ({"ids": ["pirate", "json"], "weights": [1]}, 422, "2 ids and 1 weights"),
        ({"ids": ["pirate"] * 33, "weights": [1] * 33}, 422, "33 adapters; at most 32 can be merged"),
        (BOTH | {"merge_strategy": "sum"}, 422, "must be linear, ties, dare_linear or dare_ties"),
        (BOTH | {"majority_sign_method": "loudest"}, 422, "must be total or frequency"),
        (BOTH | {"merge_strategy": "ties"}, 422, "density` must be above 0 and at most 1 for ties. Given: 0"),
        (BOTH | {"merge_strategy": "TIES", "density": 1.5}, 422, "Given: 1.5"),
        (BOTH | {"ids": ["pirate", "nobody"]}, 404, "adapter 'nobody' is not known"),
    ],
)
def test_what_makes_no_merge_is_refused(model_path: str, merged: dict[str, Any], status: int, message: str) -> None:
    async def test() -> None:
        async with api_server(model_path=model_path) as server:
            answer = await server.generate(merged_adapters=merged)
            assert (answer.status_code, message in answer.json()["error"]) == (status, True), answer.text
            assert not server.engine.adapters

    asyncio.run(test())


def test_one_adapter_and_a_merge_at_once_are_refused(model_path: str) -> None:
    async def test() -> None:
        async with api_server(model_path=model_path) as server:
            answer = await server.generate(adapter_id="pirate", merged_adapters=BOTH)
            assert answer.status_code == 422
            assert (
                answer.json()["error"]
                == "Input validation error: at most one of `adapter_id` or `merged_adapters` may be provided"
            )

    asyncio.run(test())


def test_adapters_that_are_more_than_products_are_refused(model_path: str, tmp_path: Path) -> None:
    async def test() -> None:
        async with api_server(model_path=model_path) as server:
            [version] = server.state.adapters.registry.resolve("json").versions.values()
            version.spec = msgspec.structs.replace(version.spec, dense_elements=64)
            answer = await server.generate(merged_adapters=BOTH)
            assert answer.status_code == 422
            assert "adapter 'json' cannot be merged" in answer.json()["error"]

    asyncio.run(test())
