"""Attention over the paged cache for all sequences of a group at once: one gather, one fused attention."""

import torch.nn.functional as F
from torch import Tensor


def paged_attention(
    queries: Tensor, cache: Tensor, cells: Tensor, mask: Tensor | None, num_kv_heads: int, scale: float
) -> Tensor:
    num_sequences, num_queries, width = queries.shape
    num_keys = cells.shape[1]
    head_dim = cache.shape[1] // (2 * num_kv_heads)
    keys_values = cache.index_select(0, cells.view(-1)).view(num_sequences, num_keys, 2, num_kv_heads, head_dim)
    keys, values = keys_values.permute(2, 0, 3, 1, 4).unbind(0)
    if num_queries == 1:
        # The heads that share a key head stand as its queries: no key is read twice.
        heads = queries.view(num_sequences, num_kv_heads, -1, head_dim)
        out = F.scaled_dot_product_attention(
            heads, keys, values, attn_mask=None if mask is None else mask.unsqueeze(1), scale=scale
        )
        return out.reshape(num_sequences, 1, width)
    heads = queries.view(num_sequences, num_queries, -1, head_dim).transpose(1, 2)
    out = F.scaled_dot_product_attention(
        heads, keys, values, attn_mask=None if mask is None else mask.unsqueeze(1), scale=scale, enable_gqa=True
    )
    return out.transpose(1, 2).reshape(num_sequences, num_queries, width)
