"""Linear layers over whole numbers in plain torch."""

import torch
from torch import Tensor


def int4_weight(numbers: Tensor, scales_and_offsets: Tensor) -> Tensor:
    """The weight [out, in] in float32."""
    grouped = numbers.float().view(len(numbers), len(scales_and_offsets), -1) - 8
    scales, offsets = scales_and_offsets.float().permute(2, 1, 0).unsqueeze(-1)
    return torch.addcmul(offsets, grouped, scales).flatten(1)
