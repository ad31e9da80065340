"""Tests that run what is made for GPUs: through Triton's interpreter on tensors of the CPU, or compiled on a GPU."""

import os

import pytest
import torch

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if IS_INTERPRETED else "cuda")

needs_interpreter = pytest.mark.skipif(
    not IS_INTERPRETED, reason="there is a GPU here, and Triton compiles (TRITON_INTERPRET=1)"
)
