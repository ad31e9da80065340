"""Rotary embedding and the write to the paged cache in plain torch."""

import torch
from torch import Tensor


def rotate_and_store(
    qkv: Tensor, cos: Tensor, signed_sin: Tensor, cache: Tensor, slot_mapping: Tensor, num_heads: int, head_dim: int
) -> None:
    num_kv_heads = (qkv.shape[1] // head_dim - num_heads) // 2
    turned = cos.shape[1]
    heads = qkv.view(len(qkv), -1, head_dim)[:, : num_heads + num_kv_heads, :turned]
    swapped = heads.roll(turned // 2, -1)
    heads.copy_(torch.addcmul(heads * cos.unsqueeze(1), swapped, signed_sin.unsqueeze(1)))
    cache.index_copy_(0, slot_mapping, qkv[:, num_heads * head_dim :])
