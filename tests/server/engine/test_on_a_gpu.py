"""What only a GPU can show: the tokens of the CPU, graphs like plain steps, and steps that never wait for the host."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[3] / "bench"))
from gpu_checks import check_engine, check_graphs, check_kernels
from gpu_world import make_world, random_adapter, random_model

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
GPU = torch.device("cuda")


def test_kernels_at_full_size_equal_their_references() -> None:
    assert [row for row in check_kernels(GPU, small=False) if not row["ok"]] == []


def test_greedy_tokens_are_those_of_the_cpu_engine() -> None:
    assert check_engine(GPU, 20)[0]["differing"] == 0


def test_graphs_give_the_tokens_of_plain_steps() -> None:
    assert all(row["ok"] for dtype in (torch.float32, torch.bfloat16) for row in check_graphs(GPU, dtype, small=True))


def test_decode_steps_never_wait_for_the_device_but_to_read_the_step_before() -> None:
    model = random_model("tiny", torch.bfloat16, GPU)
    adapter = random_adapter(model.config, model, 8, 1)
    world = make_world(model, {adapter.digest: adapter}, max_batch_size=4, max_total_tokens=96, num_slots=1, max_rank=8)
    try:
        names = [world.add(5, 60, digest) for digest in (None, adapter.digest, adapter.digest)]
        steps = world.run()
        while len(next(steps)[1]) < len(names):  # compiles and captures, and brings the adapter in
            pass
        next(steps)
        torch.cuda.set_sync_debug_mode("error")
        try:
            found = [next(steps)[1] for _ in range(20)]
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert all(set(tokens) == set(names) for tokens in found)
        for _ in steps:
            pass
    finally:
        world.engine.close()
