"""Rotary position embedding in plain torch."""

from torch import Tensor


def rotate(heads: Tensor, cos: Tensor, signed_sin: Tensor) -> None:
    swapped = heads.roll(heads.shape[-1] // 2, -1)
    heads.mul_(cos).addcmul_(swapped, signed_sin)
