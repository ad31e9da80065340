"""A linear over numbers in groups in plain torch: the weight is written out, then multiplied."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from loraplex_kernels.grouped_linear import PackedGroups

SLICE = 16


def grouped_linear(
    x: Tensor, weight: "PackedGroups", bias: Tensor | None = None, addend: Tensor | None = None
) -> Tensor:
    out = x.float() @ dequantize(weight).to(x.dtype).float()
    for term in (bias, addend):
        if term is not None:
            out = out + term.float()
    return out.to(x.dtype)


def dequantize(weight: "PackedGroups") -> Tensor:
    """The weight [in, out] in float32, its inputs in their own order."""
    per_word = 32 // weight.bits
    shifts = torch.arange(per_word, device=weight.words.device) * weight.bits
    blocks = weight.words.view(-1, 1, SLICE, weight.words.shape[1])
    numbers = (blocks >> shifts.view(1, -1, 1, 1)).bitwise_and_((1 << weight.bits) - 1).flatten(0, 2)[: weight.in_size]
    places = torch.arange(weight.in_size, device=weight.words.device)
    groups = places // weight.group_size if weight.group_of is None else weight.group_of[: weight.in_size].long()
    found = (numbers.float() - weight.zeros.float()[groups]) * weight.scales.float()[groups]
    if weight.order is None:
        return found
    return torch.empty_like(found).index_copy_(0, weight.order.long(), found)
