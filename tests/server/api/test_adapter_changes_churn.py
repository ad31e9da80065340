"""Random changes of adapters under running requests: every answer is of the content that its name had at admission."""

import asyncio
import random
import tracemalloc
from collections.abc import Callable
from typing import Any

from adapter_world import AdapterWorld, world
from scripted_engine import DEADLINE_S, TestServer

from loraplex_models.sources import AdapterItem
from loraplex_server.adapter_contents import AdapterContents
from loraplex_server.adapter_location import from_item
from loraplex_server.adapter_registry import FIRST_VERSION, AdapterRegistry, AdapterVersion
from loraplex_server.config import AdapterConfig

__all__ = ["world"]

RANKS = (1, 2, 3, 4)


async def change(server: TestServer, world: AdapterWorld, chance: random.Random) -> None:
    """One change of one name, whether or not it can be made now."""
    name = chance.choice("abc")
    files = [("file", item) for item in world.files(chance.choice(RANKS)).items()]
    match chance.randrange(8):
        case 0 | 1:
            await server.http.put(f"/adapters/{name}", files=files)
        case 2:
            query = {"version": chance.choice(("x", "y")), "activate": chance.choice(("true", "false"))}
            await server.http.put(f"/adapters/{name}", files=files, params=query)
        case 3:
            versions = [
                one["version"] for one in (await server.http.get(f"/adapters/{name}")).json().get("versions", [])
            ]
            shares = {version: chance.uniform(0.1, 1) for version in versions}
            await server.http.put(f"/adapters/{name}", json={"split": shares})
        case 4:
            await server.http.put(f"/adapters/{name}", json={"pinned": chance.choice((True, False))})
        case 5:
            await server.http.delete(f"/adapters/{name}")
        case 6:
            body = {"lora_name": name, "lora_path": f"place-{chance.choice(RANKS)}", "load_inplace": True}
            await server.http.post("/v1/load_lora_adapter", json=body)
        case _:
            await server.http.delete(f"/adapters/{name}@{chance.choice(('x', 'y', '1', '2'))}")


class History:
    """After each change of the registry: the contents that a name gives to requests."""

    def __init__(self, registry: AdapterRegistry):
        self.states: list[dict[str, set[str]]] = []
        self._registry = registry
        for name in ("add", "set_version", "set_spec", "split", "remove", "remove_version"):
            setattr(registry, name, self._noted(getattr(registry, name)))
        self._note()

    def contents(self, name: str, since: int) -> set[str]:
        """What the name has meant since so many states."""
        return {digest for state in self.states[since:] for digest in state.get(name, ())}

    def _noted(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            result = method(*args, **options)
            self._note()
            return result

        return call

    def _note(self) -> None:
        entries = self._registry.entries()
        specs = {entry.name: [entry.versions[version].spec for version in entry.split] for entry in entries}
        self.states.append({name: {spec.digest for spec in found if spec} for name, found in specs.items()})


async def ask(server: TestServer, chance: random.Random, history: History, wrong: list[str]) -> None:
    """One request, left half-way now and then; notes an answer of a content that its name did not have meanwhile."""
    name = chance.choice("abc")
    since = len(history.states) - 1
    asking = asyncio.create_task(server.generate(adapter_id=name))
    if chance.random() < 0.2:
        await asyncio.sleep(chance.random() * 0.02)
        asking.cancel()
    answer = (await asyncio.gather(asking, return_exceptions=True))[0]
    if isinstance(answer, BaseException) or answer.status_code == 404:
        return
    if answer.json().get("generated_text") not in {f"<{digest[:12]}>" for digest in history.contents(name, since)}:
        wrong.append(f"{name}: {answer.text}")


def test_no_answer_is_of_a_wrong_version_and_nothing_is_left_behind(world: AdapterWorld) -> None:
    for rank in RANKS:
        world.place(f"place-{rank}", rank)
    chance = random.Random(7)

    async def test(server: TestServer) -> None:
        wrong: list[str] = []
        history = History(server.state.adapters.registry)
        for _ in range(40):
            changes = [change(server, world, chance) for _ in range(3)]
            requests = [ask(server, chance, history, wrong) for _ in range(10)]
            await asyncio.gather(*changes, *requests)
        assert wrong == [] and len(history.states) > 100
        await server.until_idle()
        # What the engine knows is what the names need, no more and no less.
        adapters = server.state.adapters
        needed = {version.spec.digest for entry in adapters.registry.entries() for version in entry.versions.values()
                  if version.spec is not None}  # fmt: skip
        assert set(world.engine.adapters) == needed - {"d-pirate", "d-json"}
        for name in "abc":
            await server.http.delete(f"/adapters/{name}")
        await server.settled()
        assert world.engine.adapters == {} and world.engine.kept == set()
        async with asyncio.timeout(DEADLINE_S):
            while list(world.cache.glob("*/*")):
                await asyncio.sleep(0.02)

    world.serve(test, allow_runtime_adapters=True, dynamic_adapters=False)


def test_ten_thousand_names_take_little_memory() -> None:
    items = [AdapterItem(f"customer-{i:05d}", f"/data/adapters/customer-{i:05d}", None, True) for i in range(10_000)]
    tracemalloc.start()
    registry = AdapterRegistry(AdapterConfig(), AdapterContents(lambda message: None))
    for item in items:
        registry.add(item.adapter_id, AdapterVersion(FIRST_VERSION, from_item(item)))
    num_bytes = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert len(registry.entries()) == 10_000
    assert num_bytes < 10_000 * 4_000
    print(f"{num_bytes / 10_000:.0f} bytes a name")
