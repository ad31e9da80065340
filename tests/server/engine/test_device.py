"""A GPU that cannot be used is refused in a line with the cause and the fix."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_llm import make_tiny_world

from loraplex import LLM
from loraplex.launch_error import LaunchError
from loraplex_server.config import EngineConfig
from loraplex_server.engine.device import DeviceError, rank_device

Setting = Callable[[pytest.MonkeyPatch], None]


def gpus(count: int) -> Setting:
    """As torch tells of a machine with that many."""

    def set_up(monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)

    return set_up


def without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(1)(monkeypatch)
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", "")


def without_headers(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(1)(monkeypatch)
    monkeypatch.setenv("CC", "cc")
    monkeypatch.setattr("sysconfig.get_path", lambda *_: "empty")


CASES: list[tuple[str, Setting, int, tuple[str, ...]]] = [
    ("a torch for the CPU", lambda m: m.setattr(torch.version, "cuda", None), 0, ("without CUDA", "--device cpu")),
    ("no GPU", gpus(0), 0, ("no GPU", "nvidia-smi", "--gpus")),
    ("fewer GPUs than ranks", gpus(2), 2, ("rank 2", "2 visible", "--num-shard")),
    ("no C compiler", without_a_compiler, 0, ("C compiler", "gcc", "CC")),
    ("no headers of Python", without_headers, 0, ("Python.h in empty", "python3-dev")),
]


@pytest.mark.parametrize(("set_up", "rank", "words"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_what_is_missing_for_a_gpu_is_named(
    monkeypatch: pytest.MonkeyPatch, set_up: Setting, rank: int, words: tuple[str, ...]
) -> None:
    set_up(monkeypatch)
    with pytest.raises(DeviceError) as refused:
        rank_device(EngineConfig(model_path="", device="cuda", num_local_ranks=4), rank)
    assert all(word in str(refused.value) for word in words)
    assert "\n" not in str(refused.value)


def test_ranks_take_the_gpus_of_their_machine_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(2)(monkeypatch)
    config = EngineConfig(model_path="", device="cuda", num_local_ranks=2)
    assert [rank_device(config, rank).index for rank in range(4)] == [0, 1, 0, 1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_offline_it_is_refused_like_every_start(tmp_path: Path) -> None:
    make_tiny_world(tmp_path)
    with pytest.raises(LaunchError, match="--device cuda: torch"):
        LLM(str(tmp_path / "base"), device="cuda")
