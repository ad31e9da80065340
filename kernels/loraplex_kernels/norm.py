"""RMSNorm."""

from torch import Tensor

from loraplex_kernels.cpu import norm as _cpu
from loraplex_kernels.dispatch import on_gpu
from loraplex_kernels.lora_pages import RowDelta
from loraplex_kernels.reference import norm as _reference


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Scale each row of `x` to unit root mean square, then by `weight`.

    x: [T, hidden], dense; weight: [hidden] in the dtype of `x`; returns [T, hidden] in that dtype, computed in float32.
    """
    if on_gpu(x):
        from loraplex_kernels.gpu import norm as _gpu  # Triton exists on GPU machines only

        return _gpu.rms_norm(x, weight, eps)
    return _cpu.rms_norm(x, weight, eps)


def rms_norm_groups(x: Tensor, weight: Tensor, group_size: int, eps: float) -> None:
    """Scale each group of `group_size` columns to unit root mean square, then by `weight`, in place.

    x: [T, width], columns dense, rows may be apart; weight: [width] in the dtype of `x`; computed in float32.
    """
    if on_gpu(x):
        from loraplex_kernels.gpu import norm as _gpu  # Triton exists on GPU machines only

        _gpu.rms_norm_groups(x, weight, group_size, eps)
    else:
        _cpu.rms_norm_groups(x, weight, group_size, eps)


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float,
    delta: RowDelta | None = None, post_weight: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Add `x` to `residual` in place, then return the residual normalised as by `rms_norm`.

    x, residual: [T, hidden], dense. With `delta`, of one part, it is added to `x` first; with `post_weight`, x with
    its delta is itself normalised with that weight before it is added, as Gemma 2 does. All in float32; the norm is
    taken of the residual as it is stored.
    """
    if on_gpu(x):
        from loraplex_kernels.gpu import norm as _gpu  # Triton exists on GPU machines only

        return _gpu.add_rms_norm(x, residual, weight, eps, delta, post_weight)
    return _reference.add_rms_norm(x, residual, weight, eps, delta, post_weight)
