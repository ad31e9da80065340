"""A linear layer over a weight that was packed for the device it runs on."""

from torch import Tensor

from loraplex_kernels.cpu import few_rows as _few_rows
from loraplex_kernels.cpu import linear as _cpu
from loraplex_kernels.cpu.linear import PackedWeight as PackedWeight
from loraplex_kernels.lora import LoraSegments, LoraTable, lora_expand, lora_shrink
from loraplex_kernels.reference import linear as _reference


def pack_weight(weight: Tensor) -> Tensor | PackedWeight:
    """Return `weight` [out, in] in the layout that `linear` reads fastest; what comes back is opaque.

    A weight that has no faster layout on its device comes back as it is, not as a copy.
    """
    return _cpu.pack_weight(weight) if weight.is_cpu else _reference.pack_weight(weight)


def unpack_weight(weight: Tensor | PackedWeight) -> Tensor:
    """Return the weight [out, in] from which `pack_weight` made this one; it may be the same memory."""
    return weight.tensor.to_dense() if isinstance(weight, PackedWeight) else weight


def linear(
    x: Tensor, weight: Tensor | PackedWeight, bias: Tensor | None = None, addend: Tensor | None = None
) -> Tensor:
    """Return x @ weight.T + bias + addend; bias and addend may be absent.

    x: [T, in], rows dense; weight: [out, in], plain or from `pack_weight`; bias: [out]; addend: [T, out].
    """
    if isinstance(weight, PackedWeight):
        return _cpu.linear(x, weight, bias, addend)
    return _reference.linear(x, weight, bias, addend)


def linear_with_deltas(
    x: Tensor,
    weight: Tensor | PackedWeight,
    bias: Tensor | None,
    addend: Tensor | None,
    table: LoraTable,
    segments: LoraSegments,
) -> Tensor:
    """Return what `linear` does, plus each token's adapter delta (see `lora_shrink` and `lora_expand`)."""
    if isinstance(weight, PackedWeight) and _cpu.has_few_rows(x, weight):
        return _few_rows.product(x, weight.address, weight.out_size, bias, addend, table, segments)
    out = linear(x, weight, bias, addend)
    lora_expand(lora_shrink(x, table, segments), table, segments, out)
    return out
