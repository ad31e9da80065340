"""RMSNorm in plain torch."""

from typing import TYPE_CHECKING

from torch import Tensor

from loraplex_kernels.reference.lora_pages import with_delta

if TYPE_CHECKING:
    from loraplex_kernels.lora_pages import RowDelta


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    scaled = wide * (wide.square().mean(-1, keepdim=True) + eps).rsqrt()
    return (scaled * weight.float()).to(x.dtype)


def rms_norm_groups(x: Tensor, weight: Tensor, group_size: int, eps: float) -> None:
    groups = x.view(len(x), -1, group_size)
    groups.copy_(rms_norm(groups, weight.view(-1, group_size), eps))


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float,
    delta: "RowDelta | None" = None, post_weight: Tensor | None = None,
) -> Tensor:  # fmt: skip
    added = with_delta(x, delta).float()
    if post_weight is not None:
        added = rms_norm(added, post_weight, eps)
    residual.copy_(residual.float() + added)
    return rms_norm(residual, weight, eps)
