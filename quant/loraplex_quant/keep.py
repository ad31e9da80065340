"""In which form the weights of a model's linears are kept, once they have been read."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from loraplex_quant.config import OnTheFly
from loraplex_quant.gpu_groups import keep_groups
from loraplex_quant.method import LinearWeight, QuantMethod
from loraplex_quant.rounding import round_weight
from loraplex_quant.small_int import keep_small_int
from loraplex_quant.unquantized import Unquantized


@dataclass(frozen=True, slots=True)
class Keeping:
    """The model's number type and device, and what its plain weights are quantised to, if anything."""

    dtype: torch.dtype
    device: torch.device
    on_the_fly: OnTheFly | None = None

    def linear(self, parts: Sequence[LinearWeight]) -> QuantMethod:
        """Keep the weights of linears that read the same input, their outputs side by side.

        Whole numbers in groups stay so where the device has a kernel for them, else they become plain weights.
        """
        return self.plain(self.rounded(parts))

    def rounded(self, parts: Sequence[LinearWeight]) -> Sequence[LinearWeight]:
        """Quantise plain weights, where that is asked for."""
        if self.on_the_fly is None:
            return parts
        kind = self.on_the_fly.kind
        return [_rounded(part, kind) for part in parts]

    def plain(self, parts: Sequence[LinearWeight]) -> QuantMethod:
        """Keep the weights of what is never quantised on the fly, a router for example."""
        return (
            keep_groups(parts, self.dtype, self.device)
            or keep_small_int(parts, self.dtype, self.device)
            or Unquantized(parts, self.dtype, self.device)
        )

    def head(self, part: LinearWeight, *, may_share: bool) -> QuantMethod:
        """Keep the head's weight; `may_share` when it lies in memory that stays."""
        if self.on_the_fly is not None and self.on_the_fly.head_kind is not None:
            return self.plain([_rounded(part, self.on_the_fly.head_kind)])
        return Unquantized([part], self.dtype, self.device, may_share=may_share)


def _rounded(part: LinearWeight, kind: str) -> LinearWeight:
    if not isinstance(part.weight, Tensor):
        return part
    return LinearWeight(round_weight(part.weight, kind), part.bias)
