"""Attention over the paged cache for all sequences of a group at once, without a loop over sequences.

Few keys, or many queries: one gather of whole cells and torch's fused attention. Many keys for one query each in
bfloat16: a gather of single heads' rows, which puts each head's keys side by side, and two batched products, which take
about half the time of the fused attention there.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from loraplex_kernels.cpu.linear import is_packable

# Keys over all sequences from which the batched products win; measured with 3 key heads of 64, 1 and 2 threads.
MIN_BATCHED_KEYS = 512


def order_cells(cells: Tensor, num_queries: int, num_kv_heads: int, dtype: torch.dtype) -> Tensor:
    is_batched = num_queries == 1 and dtype != torch.float32 and is_packable(dtype)
    if not is_batched or cells.numel() < MIN_BATCHED_KEYS:
        return cells
    return torch.arange(2 * num_kv_heads).view(-1, 1, 1) + cells * (2 * num_kv_heads)


def paged_attention(
    queries: Tensor, cache: Tensor, cells: Tensor | None, mask: Tensor | None, num_kv_heads: int, scale: float
) -> Tensor:
    num_sequences, num_queries, width = queries.shape
    head_dim = cache.shape[1] // (2 * num_kv_heads)
    if cells is not None and cells.dim() == 3:
        heads = queries.view(num_sequences, num_kv_heads, -1, head_dim)
        return _batched(heads, cache, cells, mask, scale).view(num_sequences, 1, width)
    found = cache if cells is None else cache.index_select(0, cells.view(-1))
    keys_values = found.view(num_sequences, -1, 2, num_kv_heads, head_dim)
    keys, values = keys_values.permute(2, 0, 3, 1, 4).unbind(0)
    mask = None if mask is None else mask.unsqueeze(1)
    if num_queries == 1:
        # The heads that share a key head stand as its queries: no key is read twice.
        heads = queries.view(num_sequences, num_kv_heads, -1, head_dim)
        out = F.scaled_dot_product_attention(heads, keys, values, attn_mask=mask, scale=scale)
        return out.reshape(num_sequences, 1, width)
    heads = queries.view(num_sequences, num_queries, -1, head_dim).transpose(1, 2)
    out = F.scaled_dot_product_attention(heads, keys, values, attn_mask=mask, scale=scale, enable_gqa=True)
    return out.transpose(1, 2).reshape(num_sequences, num_queries, width)


def _batched(heads: Tensor, cache: Tensor, rows: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """heads: [P, key heads, heads of each, head_dim]; rows: [2 * key heads, P, K]; returns the shape of `heads`."""
    num_sequences, num_kv_heads, _, head_dim = heads.shape
    found = cache.view(-1, head_dim).index_select(0, rows.view(-1))
    keys, values = found.view(2, num_kv_heads * num_sequences, -1, head_dim).unbind(0)
    flat = heads.transpose(0, 1).reshape(num_kv_heads * num_sequences, -1, head_dim)
    if mask is None:
        scores = torch.bmm(flat * scale, keys.transpose(1, 2))
    else:
        scores = torch.baddbmm(mask.repeat(num_kv_heads, 1, 1), flat, keys.transpose(1, 2), alpha=scale)
    out = torch.bmm(scores.softmax(-1), values)
    return out.view(num_kv_heads, num_sequences, -1, head_dim).transpose(0, 1).contiguous()
