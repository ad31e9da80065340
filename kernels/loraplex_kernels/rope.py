"""Rotary position embedding."""

from torch import Tensor

from loraplex_kernels.reference import rope as _reference


def rotate(heads: Tensor, cos: Tensor, signed_sin: Tensor) -> None:
    """Turn each head by its token's angles, in place.

    heads: [T, num_heads, head_dim], may be a view; cos, signed_sin: [T, 1, head_dim], each half the same angles.
    Element i is paired with element i + head_dim / 2; `signed_sin` is negative in its first half, so that
    out = heads * cos + swap_halves(heads) * signed_sin.
    """
    _reference.rotate(heads, cos, signed_sin)
