"""Weights kept as whole numbers of 8 or 4 bits, which saves memory and, at a few rows, time."""

from collections.abc import Sequence

import torch
from torch import Tensor

from loraplex_kernels.small_int import (
    INT4_GROUPS,
    int4_linear,
    int8_linear,
    is_int4_kept,
    is_int8_kept,
    pack_int4,
    unpack_int4,
)
from loraplex_quant.grouped import GroupedWeight
from loraplex_quant.method import LinearWeight, QuantMethod
from loraplex_quant.unquantized import stacked_bias

INT8_ZERO = 128
INT4_ZERO = 8


class Int8:
    """Signed numbers of 8 bits and a scale for each output. See `QuantMethod`."""

    def __init__(self, weights: Sequence[GroupedWeight], bias: Tensor | None, dtype: torch.dtype) -> None:
        """Keep weights of 8 bits without groups, whose zeros are 128."""
        self._numbers = torch.cat([weight.numbers for weight in weights]).bitwise_xor_(INT8_ZERO).view(torch.int8)
        self._scales = torch.cat([weight.scales.flatten() for weight in weights]).to(dtype)
        self.bias = bias
        self.num_bytes = self._numbers.nbytes + self._scales.nbytes + (0 if bias is None else bias.nbytes)

    def apply(self, x: Tensor, addend: Tensor | None = None) -> Tensor:
        """Return x @ weight.T + bias + addend."""
        return int8_linear(x, self._numbers, self._scales, self.bias, addend)

    def dequantize(self) -> Tensor:
        """Return the weight in float32."""
        return self._numbers.float().mul_(self._scales.float().unsqueeze(1))


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
        self._group_size = group_size
        self.bias = bias
        kept = [self._packed, self._groups] + [tensor for tensor in (order, bias) if tensor is not None]
        self.num_bytes = sum(tensor.nbytes for tensor in kept)

    def apply(self, x: Tensor, addend: Tensor | None = None) -> Tensor:
        """Return x @ weight.T + bias + addend."""
        if self._order is not None:
            x = x.index_select(1, self._order)
        return int4_linear(x, self._packed, self._groups, self._group_size, self.bias, addend)

    def dequantize(self) -> Tensor:
        """Return the weight in float32, as exact as bfloat16."""
        weight = unpack_int4(self._packed, self._groups, self._group_size)
        return weight if self._order is None else torch.empty_like(weight).index_copy_(1, self._order, weight)


def keep_small_int(parts: Sequence[LinearWeight], dtype: torch.dtype, device: torch.device) -> QuantMethod | None:
    """Keep weights that are all in groups as the whole numbers they are; None where no kernel takes them so."""
    weights = [part.weight for part in parts if isinstance(part.weight, GroupedWeight)]
    if len(weights) < len(parts):
        return None
    if all(_is_int8(weight) for weight in weights) and is_int8_kept(weights[0].shape[1], dtype, device):
        return Int8(weights, stacked_bias(parts, dtype, device), dtype)
    if all(weight.bits == INT4_BITS for weight in weights):
        group_size, order = _common_group_size(weights), _common_order(weights)
        out_size, in_size = sum(weight.shape[0] for weight in weights), weights[0].shape[1]
        is_ordered = order is not None or all(weight.group_of is None for weight in weights)
        if is_ordered and group_size and is_int4_kept(out_size, in_size, group_size, dtype, device):
            return Int4(weights, group_size, order, stacked_bias(parts, dtype, device))
    return None


INT4_BITS = 4


def _is_int8(weight: GroupedWeight) -> bool:
    has_one_group = weight.bits == 8 and weight.group_of is None and weight.scales.shape[1] == 1
    return has_one_group and bool((weight.zeros == INT8_ZERO).all())


def _common_group_size(weights: Sequence[GroupedWeight]) -> int:
    """The largest group size that the kernel knows and that divides those of all the weights; 0 if there is none."""
    in_size = weights[0].shape[1]
    sizes = [in_size // weight.scales.shape[1] if in_size % weight.scales.shape[1] == 0 else 0 for weight in weights]
    return next((size for size in INT4_GROUPS if all(found and found % size == 0 for found in sizes)), 0)


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
