"""RMSNorm in plain torch."""

from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    scaled = wide * (wide.square().mean(-1, keepdim=True) + eps).rsqrt()
    return (scaled * weight.float()).to(x.dtype)


def rms_norm_groups(x: Tensor, weight: Tensor, group_size: int, eps: float) -> None:
    groups = x.view(len(x), -1, group_size)
    groups.copy_(rms_norm(groups, weight.view(-1, group_size), eps))
