"""What only a GPU can show: the tokens of the CPU, graphs like plain steps, and steps that never wait for the host."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[3] / "bench"))
from gpu_checks import check_engine, check_graphs, check_kernels
from gpu_world import random_model

from loraplex_models.adapters.paged_slots import PagedAdapterSlots
from loraplex_server.engine.forward_pass import ForwardPass
from loraplex_server.engine.step import ScheduledSequence, StepPlan

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
GPU = torch.device("cuda")


def test_kernels_at_full_size_equal_their_references() -> None:
    assert [row for row in check_kernels(GPU, small=False) if not row["ok"]] == []


def test_greedy_tokens_are_those_of_the_cpu_engine() -> None:
    assert check_engine(GPU, 20)[0]["differing"] == 0


def test_graphs_give_the_tokens_of_plain_steps() -> None:
    assert all(row["ok"] for dtype in (torch.float32, torch.bfloat16) for row in check_graphs(GPU, dtype, small=True))


def test_a_decode_step_never_waits_for_the_device() -> None:
    model = random_model("tiny", torch.bfloat16, GPU)
    slots = PagedAdapterSlots(model, 2, 8)
    run = ForwardPass(model, slots, num_kv_blocks=8, block_size=16, max_batch_size=2, max_blocks=4)
    plans = [
        StepPlan(
            step_id=step, num_decodes=1, sequences=[
                ScheduledSequence(
                    row=0, token_ids=[5], start=step, new_block_ids=[0] if step == 0 else [], slot=-1, samples=True
                )
            ],
        )
        for step in range(4)
    ]  # fmt: skip
    with torch.inference_mode():
        run.run(plans[0])  # compiles and captures
        torch.cuda.set_sync_debug_mode("error")
        try:
            for plan in plans[1:]:
                run.run(plan)
        finally:
            torch.cuda.set_sync_debug_mode("default")
