"""RMSNorm in plain torch."""

from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    scaled = wide * (wide.square().mean(-1, keepdim=True) + eps).rsqrt()
    return (scaled * weight.float()).to(x.dtype)
