"""What only a GPU can show: the tokens of the CPU, graphs like plain steps, and steps that never wait for the host."""

import sys
from pathlib import Path

import pytest
import torch
from decode_steps import decode_without_waiting

sys.path.append(str(Path(__file__).parents[3] / "bench"))
from gpu_checks import check_engine, check_graphs, check_kernels

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
GPU = torch.device("cuda")


def test_kernels_at_full_size_equal_their_references() -> None:
    assert [row for row in check_kernels(GPU, small=False) if not row["ok"]] == []


def test_greedy_tokens_are_those_of_the_cpu_engine() -> None:
    assert check_engine(GPU, 20)[0]["differing"] == 0


def test_graphs_give_the_tokens_of_plain_steps() -> None:
    assert all(row["ok"] for dtype in (torch.float32, torch.bfloat16) for row in check_graphs(GPU, dtype, small=True))


def test_decode_steps_never_wait_for_the_device_but_to_read_the_step_before() -> None:
    decode_without_waiting(GPU, torch.bfloat16, num_steps=20)
