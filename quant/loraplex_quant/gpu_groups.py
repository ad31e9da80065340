"""Whole numbers in groups kept as they are on a GPU, and made weights while the product is computed."""

from collections.abc import Sequence

import torch
from torch import Tensor

from loraplex_kernels.dispatch import has_gpu_forms
from loraplex_kernels.grouped_linear import grouped_linear, pack_groups, unpack_groups
from loraplex_kernels.lora import Deltas, add_deltas
from loraplex_quant.grouped import GroupedWeight
from loraplex_quant.method import ALL_ROWS, LinearWeight, QuantMethod
from loraplex_quant.unquantized import stacked_bias

# The bits of a packed number, for those of a weight: 3 do not divide a word.
PACKED_BITS = {2: 2, 3: 4, 4: 4, 8: 8}


def keep_groups(parts: Sequence[LinearWeight], dtype: torch.dtype, device: torch.device) -> QuantMethod | None:
    """Keep the weights of fused linears packed; None where the device or the weights have no such form."""
    weights = [part.weight for part in parts]
    if not has_gpu_forms(device):
        return None
    grouped = [weight for weight in weights if isinstance(weight, GroupedWeight) and weight.bits in PACKED_BITS]
    return (
        GroupedOnGpu(grouped, stacked_bias(parts, dtype, device), dtype, device)
        if len(grouped) == len(weights)
        else None
    )


class GroupedOnGpu:
    """The weights of fused linears, outputs side by side. See `QuantMethod`.

    Linears whose inputs are grouped alike are one product; act-order groups each linear's inputs in its own way.
    """

    def __init__(
        self, weights: Sequence[GroupedWeight], bias: Tensor | None, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.bias = bias
        self.packed = tuple(
            pack_groups(w.numbers, w.zeros, w.scales, w.group_of, PACKED_BITS[w.bits], dtype, device)
            for w in _joined(weights)
        )
        self.num_bytes = sum(packed.num_bytes for packed in self.packed) + (0 if bias is None else bias.nbytes)

    def apply(self, x: Tensor, addend: Tensor | None = None, deltas: Deltas | None = None) -> Tensor:
        """Return x @ weight.T + bias + addend + deltas."""
        out = self._product(x, addend)
        if deltas is not None:
            add_deltas(x, deltas, out)
        return out

    def _product(self, x: Tensor, addend: Tensor | None) -> Tensor:
        if len(self.packed) == 1:
            return grouped_linear(x, self.packed[0], self.bias, addend)
        out = torch.cat([grouped_linear(x, packed) for packed in self.packed], 1)
        for term in (self.bias, addend):
            if term is not None:
                out += term
        return out

    def logits(self, x: Tensor) -> Tensor:
        """Return x @ weight.T + bias in float32."""
        return self.apply(x).float()

    def dequantize(self, rows: slice = ALL_ROWS) -> Tensor:
        """Return the weight, or some rows, in float32."""
        return torch.cat([unpack_groups(packed) for packed in self.packed])[rows]


def _joined(weights: Sequence[GroupedWeight]) -> list[GroupedWeight]:
    first = weights[0]
    for other in weights[1:]:
        is_alike = other.bits == first.bits and other.scales.shape[1] == first.scales.shape[1]
        if not (is_alike and _same(first.group_of, other.group_of)):
            return list(weights)
    if len(weights) == 1:
        return [first]
    num_groups = first.scales.shape[1]
    return [
        GroupedWeight(
            first.bits,
            torch.cat([weight.numbers for weight in weights]),
            torch.cat([weight.zeros.expand(weight.numbers.shape[0], num_groups) for weight in weights]),
            torch.cat([weight.scales for weight in weights]),
            first.group_of,
        )
    ]


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    return one is other or (one is not None and other is not None and torch.equal(one, other))
