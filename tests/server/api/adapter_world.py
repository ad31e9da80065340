"""A server that may fetch adapters: a base model's config, a hub on loopback, a root for local ones, a store."""

import json
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from adapter_files import base_fields, write_adapter
from hub_stand_in import Hub, Repository, running_hub
from scripted_engine import ScriptedEngine, TestServer, with_server

from loraplex_server.config import AdapterSourceConfig


@dataclass
class AdapterWorld:
    """What the tests of adapters share."""

    folder: Path
    hub: Hub
    engine: ScriptedEngine = field(default_factory=ScriptedEngine)

    @property
    def root(self) -> Path:
        return self.folder / "root"

    @property
    def cache(self) -> Path:
        return self.folder / "cache"

    def files(self, rank: int = 4) -> dict[str, bytes]:
        """The files of an adapter that fits the base; another rank is another content."""
        from adapter_files import config_fields, lora_tensors

        folder = write_adapter(self.folder / f"rank-{rank}", config_fields(r=rank), lora_tensors(rank))
        return {file.name: file.read_bytes() for file in folder.iterdir()}

    def publish(self, name: str, rank: int = 4, **settings: Any) -> Repository:
        self.hub.repositories[name] = Repository(self.files(rank), **settings)
        return self.hub.repositories[name]

    def place(self, name: str, rank: int = 4) -> Path:
        """Write an adapter below the root."""
        folder = self.root / name
        folder.mkdir(parents=True)
        for file, content in self.files(rank).items():
            (folder / file).write_bytes(content)
        return folder

    def serve(self, test: Callable[[TestServer], Awaitable[None]], **settings: Any) -> None:
        """Run a test against a fresh server; `settings` are fields of AdapterSourceConfig and of the server."""
        names = AdapterSourceConfig.__dataclass_fields__
        sources = {"dynamic_adapters": True, "adapter_root": (str(self.root),), "adapter_cache": str(self.cache),
                   "hub_endpoint": self.hub.endpoint}  # fmt: skip
        sources |= {name: settings.pop(name) for name in list(settings) if name in names}
        with_server(
            test, engine=self.engine, sources=AdapterSourceConfig(**sources), model_path=str(self.folder), **settings
        )

    def digests(self) -> list[str]:
        """What the engine knows of what came while it ran."""
        return [*self.engine.adapters]

    def left_behind(self) -> list[str]:
        """Files in the store that are neither part of a complete adapter nor of one that can be resumed."""
        return [str(path) for path in self.cache.glob("*/staging/*")]


@pytest.fixture
def world(tmp_path: Path) -> Iterator[AdapterWorld]:
    (tmp_path / "config.json").write_text(json.dumps(base_fields()))
    (tmp_path / "root").mkdir()
    with running_hub() as hub:
        yield AdapterWorld(tmp_path, hub)


def refusal(answer: httpx.Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["error_type"]
