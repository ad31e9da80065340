"""Norms in plain torch."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from loraplex_kernels.reference.lora_pages import with_delta

if TYPE_CHECKING:
    from loraplex_kernels.lora_pages import RowDelta
    from loraplex_kernels.norm import Norm


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    scaled = wide * (wide.square().mean(-1, keepdim=True) + eps).rsqrt()
    return (scaled * weight.float()).to(x.dtype)


def rms_norm_groups(x: Tensor, weight: Tensor, group_size: int, eps: float) -> None:
    groups = x.view(len(x), -1, group_size)
    groups.copy_(rms_norm(groups, weight.view(-1, group_size), eps))


def add_norm(
    x: Tensor, residual: Tensor, norm: "Norm | None",
    delta: "RowDelta | None" = None, post: "Norm | None" = None, share: float = 1.0,
) -> Tensor:  # fmt: skip
    added = with_delta(x, delta).float()
    if post is not None:
        added = rms_norm(added, post.weight, post.eps)
    residual.copy_(residual.float() + added * share)
    if norm is None:
        return residual
    wide = residual.float()
    if norm.is_centred:
        wide = wide - wide.mean(-1, keepdim=True)
    normed = rms_norm(wide, norm.weight.float(), norm.eps)
    return (normed if norm.bias is None else normed + norm.bias.float()).to(x.dtype)


def head_squares(qkv: Tensor, sizes: tuple[int, int], delta: "RowDelta | None" = None) -> Tensor:
    whole = with_delta(qkv, delta).float()
    queries, keys = whole.narrow(1, 0, sizes[0]), whole.narrow(1, *sizes)
    return torch.stack((queries.square().sum(-1), keys.square().sum(-1)), 1)
