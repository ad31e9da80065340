"""Attention over the paged cache for all sequences of a group at once, without a loop over sequences.

Two forms. Little work, and float32: one gather of whole cells and torch's fused attention. More work in bfloat16: a
gather of single heads' rows, which puts each head's keys side by side, and two batched products, which take a third to
two thirds of the time of the fused attention there.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from loraplex_kernels.cpu.linear import is_packable

# Scores of one head over all sequences from which the batched products win, and how many scores over all heads they
# compute at a time: more fall out of the processor's cache. Measured with 3 key heads of 64.
MIN_BATCHED_SCORES = 512
MAX_BATCHED_SCORES = 1_000_000


def order_cells(cells: Tensor, num_queries: int, num_kv_heads: int, dtype: torch.dtype) -> Tensor:
    if dtype == torch.float32 or not is_packable(dtype) or cells.numel() * num_queries < MIN_BATCHED_SCORES:
        return cells
    return torch.arange(2 * num_kv_heads).view(-1, 1, 1) + cells * (2 * num_kv_heads)


def paged_attention(
    queries: Tensor, cache: Tensor, cells: Tensor | None, mask: Tensor | None, num_kv_heads: int, scale: float
) -> Tensor:
    num_sequences, num_queries, width = queries.shape
    head_dim = cache.shape[1] // (2 * num_kv_heads)
    if cells is not None and cells.dim() == 3:
        heads = queries.view(num_sequences, num_queries, num_kv_heads, -1, head_dim)
        chunk = max(1, MAX_BATCHED_SCORES // (num_sequences * width // head_dim * cells.shape[2]))
        return _batched(heads, cache, cells, mask, scale, chunk).view(num_sequences, num_queries, width)
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


def capped_attention(
    queries: Tensor, cache: Tensor, cells: Tensor | None, mask: Tensor | None,
    num_kv_heads: int, scale: float, cap: float,
) -> Tensor:  # fmt: skip
    """In plain torch operations over all sequences and heads at once, so good for any device."""
    if cells is not None and cells.dim() == 3:
        cells = cells[0] // (2 * num_kv_heads)
    num_sequences, num_queries, width = queries.shape
    head_dim = cache.shape[1] // (2 * num_kv_heads)
    found = cache if cells is None else cache.index_select(0, cells.view(-1))
    keys_values = found.view(num_sequences, -1, 2, num_kv_heads, head_dim)
    keys, values = keys_values.permute(2, 0, 3, 1, 4).unsqueeze(3).unbind(0)  # [P, key heads, 1, K, head_dim]
    heads = queries.view(num_sequences, num_queries, num_kv_heads, -1, head_dim).permute(0, 2, 3, 1, 4)
    out = torch.empty_like(queries, memory_format=torch.contiguous_format)
    chunk = max(1, MAX_BATCHED_SCORES // (num_sequences * width // head_dim * keys.shape[3]))
    for first in range(0, num_queries, chunk):
        part = slice(first, first + chunk)
        scores = (heads[:, :, :, part] @ keys.transpose(3, 4)).mul_(scale / cap).tanh_().mul_(cap)
        if mask is not None:
            scores += mask[:, None, None, part]
        gathered = scores.softmax(-1, dtype=torch.float32).to(values.dtype) @ values
        out[:, part] = gathered.permute(0, 3, 1, 2, 4).flatten(2)
    return out


def _batched(heads: Tensor, cache: Tensor, rows: Tensor, mask: Tensor | None, scale: float, chunk: int) -> Tensor:
    """heads: [P, N, key heads, heads of each, head_dim]; rows: [2 * key heads, P, K]; returns the shape of `heads`."""
    num_sequences, num_queries, num_kv_heads, _, head_dim = heads.shape
    found = cache.view(-1, head_dim).index_select(0, rows.view(-1))
    keys, values = found.view(2, num_kv_heads * num_sequences, -1, head_dim).unbind(0)
    keys = keys.transpose(1, 2)
    if num_queries <= chunk:
        return _attend_chunk(heads, keys, values, mask, scale)
    out = torch.empty_like(heads, memory_format=torch.contiguous_format)
    for first in range(0, num_queries, chunk):
        part = slice(first, first + chunk)
        part_mask = None if mask is None else mask[:, part]
        out[:, part] = _attend_chunk(heads[:, part], keys, values, part_mask, scale)
    return out


def _attend_chunk(heads: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    num_sequences, num_queries, num_kv_heads, num_shared, head_dim = heads.shape
    # One matrix for each key head and sequence: the heads that share it, and their queries, are its rows.
    flat = heads.permute(2, 0, 3, 1, 4).reshape(num_kv_heads * num_sequences, -1, head_dim)
    if mask is None:
        scores = torch.bmm(flat * scale, keys)
    else:
        wide_mask = mask.unsqueeze(1).expand(-1, num_shared, -1, -1).reshape(num_sequences, flat.shape[1], -1)
        scores = torch.baddbmm(wide_mask.repeat(num_kv_heads, 1, 1), flat, keys, alpha=scale)
    out = torch.bmm(scores.softmax(-1), values)
    shape = (num_kv_heads, num_sequences, num_shared, num_queries, head_dim)
    return out.view(shape).permute(1, 3, 0, 2, 4).contiguous()
