"""A linear layer over a weight that was packed for the device it runs on."""

from torch import Tensor

from loraplex_kernels.cpu import linear as _cpu
from loraplex_kernels.cpu.few_rows import product
from loraplex_kernels.cpu.linear import PackedWeight as PackedWeight
from loraplex_kernels.lora import Deltas, add_deltas
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
    x: Tensor,
    weight: Tensor | PackedWeight,
    bias: Tensor | None = None,
    addend: Tensor | None = None,
    deltas: Deltas | None = None,
) -> Tensor:
    """Return x @ weight.T + bias + addend + the adapters' deltas; all but the product may be absent.

    x: [T, in], rows dense; weight: [out, in], plain or from `pack_weight`; bias: [out]; addend: [T, out].
    """
    if not isinstance(weight, PackedWeight):
        out = _reference.linear(x, weight, bias, addend)
    elif weight.blocks is not None and len(x) <= _cpu.FEW_ROWS:
        return product(x, weight.blocks, bias, addend, deltas)
    else:
        out = _cpu.linear(x, weight, bias, addend)
    if deltas is not None:
        add_deltas(x, deltas, out)
    return out


def wide_linear(x: Tensor, weight: Tensor | PackedWeight, bias: Tensor | None = None) -> Tensor:
    """Return x @ weight.T + bias in float32, at few rows not rounded to x's type before."""
    if isinstance(weight, PackedWeight) and weight.blocks is not None and len(x) <= _cpu.FEW_ROWS:
        return product(x, weight.blocks, bias, is_wide=True)
    return linear(x, weight, bias).float()
