"""RMSNorm."""

from torch import Tensor

from loraplex_kernels.cpu import norm as _cpu
from loraplex_kernels.reference import norm as _reference


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Scale each row of `x` to unit root mean square, then by `weight`.

    x: [T, hidden], dense; weight: [hidden] in the dtype of `x`; returns [T, hidden] in that dtype, computed in float32.
    """
    return _cpu.rms_norm(x, weight, eps) if x.is_cpu else _reference.rms_norm(x, weight, eps)


def rms_norm_groups(x: Tensor, weight: Tensor, group_size: int, eps: float) -> None:
    """Scale each group of `group_size` columns to unit root mean square, then by `weight`, in place.

    x: [T, width], columns dense, rows may be apart; weight: [width] in the dtype of `x`; computed in float32.
    """
    operation = _cpu.rms_norm_groups if x.is_cpu else _reference.rms_norm_groups
    operation(x, weight, group_size, eps)
