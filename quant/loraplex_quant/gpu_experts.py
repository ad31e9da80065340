"""One linear of all experts of a layer on a GPU: their weights in one tensor, for one product over rows in tiles."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from loraplex_kernels.grouped_linear import PackedGroups, stack_groups
from loraplex_kernels.moe_tiles import ExpertTiles, expert_linear, grouped_expert_linear
from loraplex_quant.gpu_groups import GroupedOnGpu, keep_groups
from loraplex_quant.grouped import plain
from loraplex_quant.keep import Keeping
from loraplex_quant.method import LinearWeight
from loraplex_quant.unquantized import stack


class ExpertWeights(Protocol):
    """The weights of one linear of all experts."""

    num_bytes: int

    def apply(self, x: Tensor, tiles: ExpertTiles, *, is_by_token: bool) -> Tensor:
        """Return each row's product with its expert's weight, [R, out]; x as in `expert_linear`."""
        ...


class PlainExperts:
    """Plain weights [experts, out, in]. See `ExpertWeights`."""

    def __init__(self, weight: Tensor) -> None:
        self._weight = weight
        self.num_bytes = weight.nbytes

    def apply(self, x: Tensor, tiles: ExpertTiles, *, is_by_token: bool) -> Tensor:
        """Return each row's product."""
        return expert_linear(x, self._weight, tiles, is_by_token=is_by_token)


class PackedExperts:
    """Whole numbers in groups, which become weights in registers; outputs side by side. See `ExpertWeights`."""

    def __init__(self, weights: Sequence[PackedGroups]) -> None:
        self._weights = tuple(weights)
        self.num_bytes = sum(weight.num_bytes for weight in weights)

    def apply(self, x: Tensor, tiles: ExpertTiles, *, is_by_token: bool) -> Tensor:
        """Return each row's product."""
        outs = [grouped_expert_linear(x, weight, tiles, is_by_token=is_by_token) for weight in self._weights]
        return outs[0] if len(outs) == 1 else torch.cat(outs, 1)


def keep_experts(experts: Sequence[Sequence[LinearWeight]], keeping: Keeping) -> ExpertWeights:
    """Keep one linear of all experts, each of fused parts without biases; packed where all of them are alike in groups.

    Linears whose inputs are grouped alike are one product, as in `GroupedOnGpu`.
    """
    experts = [keeping.rounded(parts) for parts in experts]
    kept = [keep_groups(parts, keeping.dtype, keeping.device) for parts in experts]
    packed = [one.packed for one in kept if isinstance(one, GroupedOnGpu)]
    if len(packed) == len(experts) and len({len(parts) for parts in packed}) == 1:
        stacked = [stack_groups(weights) for weights in zip(*packed, strict=True)]
        whole = [weight for weight in stacked if weight is not None]
        if len(whole) == len(stacked):
            return PackedExperts(whole)
    return PlainExperts(
        torch.stack([stack([plain(part.weight) for part in parts], keeping.dtype, keeping.device) for parts in experts])
    )
