"""`LLM` over two ranks: rank 0 in this process, the other one in its own."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from demo_server import is_alive, wait_until
from tiny_llm import ADAPTERS, make_tiny_world

from loraplex import LLM, LoRARequest, SamplingParams
from loraplex.launch_error import LaunchError
from loraplex_server.errors import GenerationFailed

GREEDY = SamplingParams(temperature=0, max_tokens=12)
FLAGS: dict[str, Any] = {"dtype": "float32", "num_kv_blocks": 256, "num_threads": 1}
PROMPTS = ["once upon a time", "the quick brown fox", "in the beginning"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    make_tiny_world(folder)
    return folder


def rank_pids() -> list[int]:
    """The processes of other ranks that this one has started."""
    children = [child for child in psutil.Process().children() if is_alive(child.pid)]
    return [child.pid for child in children if "loraplex.processes" in child.cmdline()]


@pytest.fixture
def two_ranks(world: Path) -> Iterator[LLM]:
    with LLM(str(world / "base"), tensor_parallel_size=2, **FLAGS) as llm:
        assert len(rank_pids()) == 1
        yield llm
    assert rank_pids() == []


def token_ids(llm: LLM, world: Path) -> list[list[int]]:
    adapters = [None, *(LoRARequest(name, number, str(world / name)) for number, name in enumerate(ADAPTERS, start=1))]
    outputs = llm.generate(PROMPTS, GREEDY, lora_request=adapters, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


@pytest.mark.slow
def test_two_ranks_answer_as_one_and_a_lost_one_is_an_error(two_ranks: LLM, world: Path) -> None:
    with LLM(str(world / "base"), **FLAGS) as alone:
        assert token_ids(two_ranks, world) == token_ids(alone, world)
    (pid,) = rank_pids()
    os.kill(pid, signal.SIGKILL)
    for _ in range(2):
        with pytest.raises(GenerationFailed, match=r"engine-1 was killed by SIGKILL.*make another LLM"):
            two_ranks.generate(PROMPTS, GREEDY, use_tqdm=False)


@pytest.mark.slow
def test_a_rank_that_is_stopped_is_an_error_and_not_a_wait(two_ranks: LLM) -> None:
    (pid,) = rank_pids()
    os.kill(pid, signal.SIGSTOP)
    with pytest.raises(GenerationFailed, match="engine-1 was stopped"):
        two_ranks.generate(PROMPTS, GREEDY, use_tqdm=False)


@pytest.mark.slow
def test_a_rank_that_cannot_start_is_a_launch_error_with_its_reason(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "loraplex").mkdir()
    (tmp_path / "loraplex" / "processes.py").write_text("raise SystemExit(7)")
    (tmp_path / "loraplex" / "__init__.py").touch()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(LaunchError, match="engine-1 ended with exit code 7"):
        LLM(str(world / "base"), tensor_parallel_size=2, **FLAGS)
    wait_until(lambda: rank_pids() == [], "the end of the rank", 30)
