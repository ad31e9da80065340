"""RMSNorm in plain torch."""

from torch import Tensor


def rms_norm(x: Tensor, scale: Tensor, floor: Tensor) -> Tensor:
    wide = x.float()
    squares = (wide * wide).sum(-1, keepdim=True)
    return (wide / (squares + floor * floor).sqrt() * scale).to(x.dtype)
