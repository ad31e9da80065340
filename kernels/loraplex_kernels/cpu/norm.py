"""RMSNorm in four operations: torch's own takes eight on a CPU, and at few rows calls are what costs."""

import torch
from torch import Tensor


def rms_norm(x: Tensor, scale: Tensor, floor: Tensor) -> Tensor:
    lengths = torch.linalg.vector_norm(x, 2, -1, True, dtype=torch.float32)
    unit = torch.div(x, torch.hypot(lengths, floor))
    return torch.mul(unit, scale, out=torch.empty_like(x))
