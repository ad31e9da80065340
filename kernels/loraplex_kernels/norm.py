"""RMSNorm."""

from torch import Tensor

from loraplex_kernels.cpu import norm as _cpu
from loraplex_kernels.reference import norm as _reference


def rms_norm(x: Tensor, scale: Tensor, floor: Tensor) -> Tensor:
    """Return x / hypot(|x|, floor) * scale for each row, where |x| is the row's Euclidean length.

    This is RMSNorm with scale = weight * sqrt(hidden) and floor = sqrt(eps * hidden).
    x: [T, hidden]; scale: [hidden] float32; floor: [] float32; returns [T, hidden] in the dtype of `x`, computed in
    float32.
    """
    return _cpu.rms_norm(x, scale, floor) if x.is_cpu else _reference.rms_norm(x, scale, floor)
