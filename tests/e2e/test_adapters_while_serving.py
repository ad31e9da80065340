"""Adapters that come, change and go while real processes serve: each answers as it does with peft alone."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from demo_server import LaunchedServer, wait_until
from hub_stand_in import Repository, running_hub
from tiny_models import load_peft, make_peft_adapter, unload_peft
from tiny_tokenizer import byte_tokenizer
from transformers import AutoModelForCausalLM

PROMPT = "What is here, and what has come since?"
NUM_TOKENS = 12


def files_of(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in ("adapter_config.json", "adapter_model.safetensors")}


class World:
    """Adapters by name, and what peft says with each of them."""

    def __init__(self, base: Path, folder: Path):
        self._model = AutoModelForCausalLM.from_pretrained(base, torch_dtype=torch.float32).eval()
        self._tokenizer = byte_tokenizer()
        self.folders = {
            name: make_peft_adapter(folder / name, self._model, rank=rank, seed=rank)
            for name, rank in (("hub", 3), ("local", 5), ("upload", 8), ("next", 16))
        }

    def truth(self, name: str) -> list[int]:
        """The greedy tokens of transformers and peft."""
        adapted = load_peft(self.folders[name], self._model)
        token_ids = self._tokenizer.encode(PROMPT).ids
        prompt_length = len(token_ids)
        with torch.inference_mode():
            for _ in range(NUM_TOKENS):
                token_ids.append(int(adapted(torch.tensor([token_ids])).logits[0, -1].argmax()))
        self._model = unload_peft(adapted)
        return token_ids[prompt_length:]


def tokens(server: LaunchedServer, adapter_id: str, **more: Any) -> list[int] | tuple[int, str]:
    parameters = {"adapter_id": adapter_id, "max_new_tokens": NUM_TOKENS, "details": True, "ignore_eos_token": True}
    answer = httpx.post(
        f"{server.url}/generate", json={"inputs": PROMPT, "parameters": parameters | more}, timeout=300
    ).json()
    if "error" in answer:
        return answer["error_type"], answer["error"]
    return [token["id"] for token in answer["details"]["tokens"]]


def upload(server: LaunchedServer, name: str, folder: Path) -> None:
    parts = [("file", (file, content)) for file, content in files_of(folder).items()]
    answer = httpx.put(f"{server.url}/adapters/{name}", files=parts, timeout=300)
    assert answer.status_code == 200, answer.text


def shown(server: LaunchedServer, name: str) -> dict[str, Any]:
    version: dict[str, Any] = httpx.get(f"{server.url}/adapters/{name}", timeout=300).json()["versions"][0]
    return version


def test_adapters_come_change_and_go(
    launch: Callable[..., LaunchedServer],
    tiny_world: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = World(tiny_world / "base", tmp_path / "adapters")
    with running_hub() as hub:
        hub.repositories["acme/hub"] = Repository(files_of(world.folders["hub"]))
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        server = launch(
            *("--model-id", str(tiny_world / "base"), "--num-threads", "1", "--num-kv-blocks", "4096"),
            *("--dynamic-adapters", "--allow-runtime-adapters", "--adapter-root", str(tmp_path / "adapters")),
            *("--adapter-cache", str(tmp_path / "cache"), "--dtype", "float32"),
            *("--max-engine-restarts", "1"),
        ).wait_ready()
        # From the hub and from a folder, on first use
        assert tokens(server, "acme/hub") == world.truth("hub")
        assert tokens(server, "local", adapter_source="local") == world.truth("local")
        # Uploaded, then replaced under the same name
        upload(server, "mine", world.folders["upload"])
        assert tokens(server, "mine") == world.truth("upload")
        before = shown(server, "mine")
        assert before["tier"] == "device" and before["device_bytes"] > 0 and before["rank"] == 8
        upload(server, "mine", world.folders["next"])
        assert tokens(server, "mine") == world.truth("next")
        assert shown(server, "mine")["digest"] != before["digest"]
        # vLLM's routes
        body = {"lora_name": "l", "lora_path": str(world.folders["local"])}
        assert httpx.post(f"{server.url}/v1/load_lora_adapter", json=body, timeout=300).status_code == 200
        assert tokens(server, "l") == world.truth("local")
        # The engine is lost, and a new one is told of them all
        server.kill("engine")
        wait_until(lambda: "ready again" in server.said, "the next engine")
        for name, adapter in (("acme/hub", "hub"), ("mine", "next"), ("l", "local")):
            assert tokens(server, name) == world.truth(adapter)
        # Gone by name; memory goes with the last request
        assert httpx.delete(f"{server.url}/adapters/mine", timeout=300).status_code == 204
        refused = tokens(server, "mine", adapter_source="hub")
        assert refused[0] == "validation"  # no name any more, and no hub id
        metrics = httpx.get(f"{server.url}/metrics", timeout=300).text
        assert "loraplex_adapter_pins 0" in metrics
