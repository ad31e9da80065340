"""Where Triton's kernels are tested: compiled on a GPU, or in the interpreter on the CPU; and how near is near."""

import os

import torch
from torch import Tensor

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if IS_INTERPRETED else "cuda")
# The interpreter's products of bfloat16 are wrong, so only a GPU takes that.
DTYPES = [torch.float32, torch.float16] + ([] if IS_INTERPRETED else [torch.bfloat16])
TOLERANCES = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def error(ours: Tensor, truth: Tensor) -> float:
    """The largest difference, in shares of the largest true number or of 1."""
    assert ours.shape == truth.shape
    if not truth.numel():
        return 0.0
    return float((ours.float() - truth.float()).abs().max()) / max(1.0, float(truth.float().abs().max()))


def assert_near(ours: Tensor, truth: Tensor, dtype: torch.dtype | None = None) -> None:
    """Compare in the tolerance of `dtype`, by default the results' own."""
    assert ours.dtype == truth.dtype
    assert error(ours, truth) <= TOLERANCES[dtype or ours.dtype], error(ours, truth)
