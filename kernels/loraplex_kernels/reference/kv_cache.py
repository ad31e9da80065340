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
    delta: "RowDelta | None" = None, norms: "HeadNorms | None" = None,
) -> None:  # fmt: skip
    num_kv_heads = (qkv.shape[1] // head_dim - num_heads) // 2
    turned = cos.shape[1]
    whole = with_delta(qkv, delta).reshape(len(qkv), -1, head_dim).clone()
    if norms is not None:
        weights = torch.cat((norms.query_weight, norms.key_weight)).view(-1, head_dim)
        rotated = whole[:, : num_heads + num_kv_heads]
        rotated.copy_(rms_norm(rotated, weights, norms.eps))
    heads = whole[:, : num_heads + num_kv_heads, :turned]
    swapped = heads.roll(turned // 2, -1)
    heads.copy_(torch.addcmul(heads * cos.unsqueeze(1), swapped, signed_sin.to(swapped.dtype).unsqueeze(1)))
    qkv.copy_(whole.view(qkv.shape))
    cache.index_copy_(0, slot_mapping, qkv[:, num_heads * head_dim :])
