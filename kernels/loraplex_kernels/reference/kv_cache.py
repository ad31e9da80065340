"""Rotary embedding and the write to the paged cache in plain torch."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from loraplex_kernels.reference.lora_pages import with_delta
from loraplex_kernels.reference.norm import rms_norm

if TYPE_CHECKING:
    from loraplex_kernels.kv_cache import HeadNorms
    from loraplex_kernels.lora_pages import RowDelta


def rotate_and_store(
    qkv: Tensor, cos: Tensor, signed_sin: Tensor, cache: Tensor, slot_mapping: Tensor, num_heads: int, head_dim: int,
    delta: "RowDelta | None" = None, norms: "HeadNorms | None" = None, *, are_neighbours: bool = False,
) -> None:  # fmt: skip
    num_kv_heads = (qkv.shape[1] // head_dim - num_heads) // 2
    turned = cos.shape[1]
    whole = with_delta(qkv, delta).reshape(len(qkv), -1, head_dim).clone()
    if norms is not None:
        weights = torch.cat((norms.query_weight, norms.key_weight)).view(-1, head_dim)
        rotated = whole[:, : num_heads + num_kv_heads]
        if norms.squares is None:
            rotated.copy_(rms_norm(rotated, weights, norms.eps))
        else:
            scales = (norms.squares / torch.tensor(norms.widths, device=qkv.device) + norms.eps).rsqrt()
            counts = torch.tensor([num_heads, num_kv_heads], device=qkv.device)
            wide = scales.repeat_interleave(counts, 1).unsqueeze(-1)
            rotated.copy_(rotated.float() * wide * weights.float())
    heads = whole[:, : num_heads + num_kv_heads, :turned]
    if are_neighbours:
        order = torch.arange(turned, device=qkv.device).view(-1, 2).t().flatten()
        heads[..., order] = _turn(heads[..., order], cos, signed_sin)
    else:
        heads.copy_(_turn(heads, cos, signed_sin))
    qkv.copy_(whole.view(qkv.shape))
    cache.index_copy_(0, slot_mapping, qkv[:, num_heads * head_dim :])


def _turn(heads: Tensor, cos: Tensor, signed_sin: Tensor) -> Tensor:
    swapped = heads.roll(heads.shape[-1] // 2, -1)
    return torch.addcmul(heads * cos.unsqueeze(1), swapped, signed_sin.to(swapped.dtype).unsqueeze(1))
