"""A linear layer over a weight that was packed for the device it runs on."""

from torch import Tensor

from loraplex_kernels.cpu import linear as _cpu
from loraplex_kernels.cpu.linear import PackedWeight as PackedWeight
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
