"""The LoRA delta in plain torch, one token at a time."""

import torch
from torch import Tensor

from loraplex_kernels.lora import LoraSegments, LoraTable


def lora_delta(x: Tensor, table: LoraTable, segments: LoraSegments) -> Tensor:
    """What shrink and expand together add to the output, [T, sum of the parts' sizes] float32."""
    delta = x.new_zeros(len(x), sum(table.part_sizes)).float()
    for start, end, slot in segments.all:
        for token in range(start, end):
            for part, columns in enumerate(torch.split(delta[token], list(table.part_sizes))):
                if (slot, part) in table.weights:
                    a, b = table.weights[slot, part]
                    columns += b.float().T @ (a.float() @ x[token].float())
    return delta
