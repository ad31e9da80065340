"""Weights kept as whole numbers of 8 or 4 bits, which saves memory and, at a few rows, time."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from loraplex_kernels.lora import Deltas, add_deltas
from loraplex_kernels.small_int import (
    int4_linear,
    int8_linear,
    is_int4_kept,
    is_int8_kept,
    pack_int4,
    pack_int8,
    unpack_int4,
    unpack_int8,
)
from loraplex_quant.grouped import GroupedWeight
from loraplex_quant.method import ALL_ROWS, LinearWeight, QuantMethod
from loraplex_quant.unquantized import stacked_bias

INT8_ZERO = 128
INT4_ZERO = 8


class Int8:
    """Signed numbers of 8 bits and a scale for each output. See `QuantMethod`."""

    def __init__(self, weights: Sequence[GroupedWeight], bias: Tensor | None) -> None:
        """Keep weights of 8 bits without groups, whose zeros are 128."""
        numbers = torch.cat([weight.numbers for weight in weights]).bitwise_xor_(INT8_ZERO).view(torch.int8)
        self._packed = pack_int8(numbers)
        self._scales = torch.cat([weight.scales.flatten() for weight in weights]).float()
        self.bias = bias
        self.num_bytes = self._packed.nbytes + self._scales.nbytes + (0 if bias is None else bias.nbytes)

    def apply(self, x: Tensor, addend: Tensor | None = None, deltas: Deltas | None = None) -> Tensor:
        """Return x @ weight.T + bias + addend + deltas."""
        return int8_linear(x, self._packed, self._scales, self.bias, addend, deltas)

    def logits(self, x: Tensor) -> Tensor:
        """Return x @ weight.T + bias in float32."""
        return self.apply(x).float()

    def dequantize(self, rows: slice = ALL_ROWS) -> Tensor:
        """Return the weight, or some rows, in float32."""
        return unpack_int8(self._packed)[rows].float().mul_(self._scales[rows].unsqueeze(1))


class Int4:
    """Numbers of 4 bits in groups, with a scale and an offset each. See `QuantMethod`.

    With act-order the inputs are brought into the groups' order in each step.
    """

    def __init__(
        self, weights: Sequence[GroupedWeight], group_size: int, order: Tensor | None, bias: Tensor | None
    ) -> None:
        """`weights` have groups that are runs of `group_size` inputs or a multiple of it, once brought into `order`."""
        numbers = torch.cat([weight.numbers for weight in weights])
        self._order = order
        self._packed = pack_int4(numbers if order is None else numbers.index_select(1, order))
        self._groups = torch.cat([_scales_and_offsets(weight, group_size) for weight in weights], dim=1)
        self.bias = bias
        kept = [self._packed, self._groups] + [tensor for tensor in (order, bias) if tensor is not None]
        self.num_bytes = sum(tensor.nbytes for tensor in kept)

    def apply(self, x: Tensor, addend: Tensor | None = None, deltas: Deltas | None = None) -> Tensor:
        """Return x @ weight.T + bias + addend + deltas."""
        if self._order is None:
            return int4_linear(x, self._packed, self._groups, self.bias, addend, deltas)
        out = int4_linear(x.index_select(1, self._order), self._packed, self._groups, self.bias, addend)
        if deltas is not None:
            add_deltas(x, deltas, out)
        return out

    def logits(self, x: Tensor) -> Tensor:
        """Return x @ weight.T + bias in float32."""
        return self.apply(x).float()

    def dequantize(self, rows: slice = ALL_ROWS) -> Tensor:
        """Return the weight, or some rows, in float32."""
        numbers = unpack_int4(self._packed)
        grouped = numbers.float().sub_(INT4_ZERO).view(len(numbers), len(self._groups), -1)
        scales, offsets = self._groups.float().permute(2, 1, 0).unsqueeze(-1)
        weight = grouped.mul_(scales).add_(offsets).flatten(1)
        return (weight if self._order is None else torch.empty_like(weight).index_copy_(1, self._order, weight))[rows]


def keep_small_int(parts: Sequence[LinearWeight], dtype: torch.dtype, device: torch.device) -> QuantMethod | None:
    """Keep weights that are all in groups as the whole numbers they are; None where no kernel takes them so."""
    weights = [part.weight for part in parts if isinstance(part.weight, GroupedWeight)]
    if len(weights) < len(parts):
        return None
    out_size, in_size = sum(weight.shape[0] for weight in weights), weights[0].shape[1]
    if all(_is_int8(weight) for weight in weights) and is_int8_kept(out_size, in_size, dtype, device):
        return Int8(weights, stacked_bias(parts, dtype, device))
    if all(weight.bits <= INT4_BITS for weight in weights):
        group_size, order = _common_group_size(weights), _common_order(weights)
        is_ordered = order is not None or all(weight.group_of is None for weight in weights)
        if is_ordered and group_size and is_int4_kept(out_size, in_size, group_size, dtype, device):
            return Int4(weights, group_size, order, stacked_bias(parts, dtype, device))
    return None


INT4_BITS = 4


def _is_int8(weight: GroupedWeight) -> bool:
    has_one_group = weight.bits == 8 and weight.group_of is None and weight.scales.shape[1] == 1
    return has_one_group and bool((weight.zeros == INT8_ZERO).all())


def _common_group_size(weights: Sequence[GroupedWeight]) -> int:
    """The largest group size that divides those of all the weights; 0 where one has groups of different sizes."""
    in_size = weights[0].shape[1]
    sizes = [in_size // weight.scales.shape[1] if in_size % weight.scales.shape[1] == 0 else 0 for weight in weights]
    return math.gcd(*sizes) if all(sizes) else 0


def _common_order(weights: Sequence[GroupedWeight]) -> Tensor | None:
    """The order of inputs that makes all weights' groups runs of equal length; None where there is none or no need."""
    group_of = weights[0].group_of
    if group_of is None or any(
        weight.group_of is None or not torch.equal(weight.group_of, group_of) for weight in weights
    ):
        return None
    counts = group_of.bincount(minlength=weights[0].scales.shape[1])
    return group_of.argsort(stable=True) if bool((counts == counts[0]).all()) else None


def _scales_and_offsets(weight: GroupedWeight, group_size: int) -> Tensor:
    """[in / group_size, out, 2] bfloat16; a longer group is told once for each part of it."""
    scales = weight.scales.float()
    offsets = (INT4_ZERO - weight.zeros.float()) * scales
    times = weight.shape[1] // (scales.shape[1] * group_size)
    pairs = torch.stack((scales, offsets.expand_as(scales)), dim=-1).transpose(0, 1)
    return pairs.repeat_interleave(times, dim=0).to(torch.bfloat16).contiguous()
