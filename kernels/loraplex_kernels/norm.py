"""Norms of rows, alone and together with the addition before them."""

from dataclasses import dataclass

from torch import Tensor

from loraplex_kernels.cpu import norm as _cpu
from loraplex_kernels.dispatch import on_gpu
from loraplex_kernels.lora_pages import RowDelta
from loraplex_kernels.reference import norm as _reference


@dataclass(frozen=True, slots=True)
class Norm:
    """How rows are normalised: to unit root mean square, after their mean was taken off where `is_centred`.

    Then they are scaled by `weight` [hidden], and `bias` [hidden] is added where there is one.
    """

    weight: Tensor
    eps: float
    bias: Tensor | None = None
    is_centred: bool = False


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


def add_norm(
    x: Tensor, residual: Tensor, norm: Norm | None,
    delta: RowDelta | None = None, post: Norm | None = None, share: float = 1.0,
) -> Tensor:  # fmt: skip
    """Add `share` of `x` to `residual` in place, then return the residual normalised; without `norm`, as it is.

    x, residual: [T, hidden], dense. With `delta`, of one part, it is added to `x` first; with `post`, an RMSNorm, x
    with its delta is itself normalised before it is added, as Gemma 2 does. All in float32; the norm is taken of the
    residual as it is stored.
    """
    if on_gpu(x):
        from loraplex_kernels.gpu import norm as _gpu  # Triton exists on GPU machines only

        return _gpu.add_norm(x, residual, norm, delta, post, share)
    return _reference.add_norm(x, residual, norm, delta, post, share)


def head_squares(qkv: Tensor, sizes: tuple[int, int], delta: RowDelta | None = None) -> Tensor:
    """Return the sums of squares of each token's queries and of its keys, [T, 2] float32.

    qkv: [T, queries | keys | values], dense; sizes: of queries and keys. With `delta`, of three parts or one, it is
    added to `qkv` first, which stays as it is.
    """
    if on_gpu(qkv):
        from loraplex_kernels.gpu import norm as _gpu  # Triton exists on GPU machines only

        return _gpu.head_squares(qkv, sizes, delta)
    return _reference.head_squares(qkv, sizes, delta)
