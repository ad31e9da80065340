"""What adapters take on the device, as processes tell it: their own ranks in whole pages, and nothing once gone."""

import re
from collections.abc import Callable
from pathlib import Path

import httpx
from demo_server import LaunchedServer, wait_until
from tiny_models import make_peft_adapter
from transformers import AutoModelForCausalLM


def device_bytes(server: LaunchedServer) -> dict[str, int]:
    listed = httpx.get(f"{server.url}/adapters", timeout=300).json()["adapters"]
    return {one["name"]: one["versions"][0]["device_bytes"] for one in listed}


def gauge(server: LaunchedServer) -> int:
    found = re.search(
        r"^loraplex_adapter_device_bytes (\S+)", httpx.get(f"{server.url}/metrics", timeout=300).text, re.MULTILINE
    )
    assert found is not None
    return int(float(found[1]))


def test_ranks_8_and_64_side_by_side_take_one_to_eight_and_give_it_back(
    launch: Callable[..., LaunchedServer], tiny_world: Path, tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_world / "base")
    adapters = {f"r{rank}": make_peft_adapter(tmp_path / f"r{rank}", model, rank=rank) for rank in (8, 64)}
    server = launch(
        *("--model-id", str(tiny_world / "base"), "--num-threads", "1", "--num-kv-blocks", "256"),
        *("--lora-adapters", ",".join(f"{name}={folder}" for name, folder in adapters.items())),
        "--allow-runtime-adapters",
    ).wait_ready()
    for name in adapters:
        body = {"inputs": "Hello", "parameters": {"adapter_id": name, "max_new_tokens": 2}}
        assert httpx.post(f"{server.url}/generate", json=body, timeout=300).status_code == 200
    wait_until(lambda: all(device_bytes(server).values()), "both adapters on the device")
    taken = device_bytes(server)
    assert taken["r64"] == 8 * taken["r8"]
    wait_until(lambda: gauge(server) == sum(taken.values()), "the sum in the metrics")
    assert httpx.delete(f"{server.url}/adapters/r64", timeout=300).status_code < 300
    wait_until(lambda: gauge(server) == taken["r8"], "the bytes of the larger one given back")
    assert device_bytes(server) == {"r8": taken["r8"]}
