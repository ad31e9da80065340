"""The LoRA delta in plain torch, one token at a time."""

import torch
from torch import Tensor


def pack_lora(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    return a, b


def lora_shrink(x: Tensor, a: Tensor, foreign: Tensor | None) -> Tensor:
    out = x.new_zeros(len(x), len(a))
    for token in range(len(x)):
        own = torch.ones(len(a), dtype=torch.bool) if foreign is None else ~foreign[token]
        out[token, own] = a[own] @ x[token]
    return out


def lora_expand(h: Tensor, b: Tensor, out: Tensor) -> Tensor:
    return out + h @ b
