"""RMSNorm."""

from torch import Tensor

from loraplex_kernels.cpu import norm as _cpu
from loraplex_kernels.reference import norm as _reference


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Scale each row of `x` to unit root mean square, then by `weight`.

    x: [T, hidden], dense; weight: [hidden] in the dtype of `x`; returns [T, hidden] in that dtype, computed in float32.
    """
    return _cpu.rms_norm(x, weight, eps) if x.is_cpu else _reference.rms_norm(x, weight, eps)
