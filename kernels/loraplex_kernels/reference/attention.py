"""Attention over the paged cache in plain torch, one sequence and one head at a time."""

import torch
from torch import Tensor


def paged_attention(
    queries: Tensor, cache: Tensor, cells: Tensor | None, mask: Tensor | None, num_kv_heads: int, scale: float
) -> Tensor:
    return _attend(queries, cache, cells, mask, num_kv_heads, scale, None)


def capped_attention(
    queries: Tensor, cache: Tensor, cells: Tensor | None, mask: Tensor | None,
    num_kv_heads: int, scale: float, cap: float,
) -> Tensor:  # fmt: skip
    return _attend(queries, cache, cells, mask, num_kv_heads, scale, cap)


def _attend(
    queries: Tensor, cache: Tensor, cells: Tensor | None, mask: Tensor | None,
    num_kv_heads: int, scale: float, cap: float | None,
) -> Tensor:  # fmt: skip
    if cells is not None and cells.dim() == 3:
        cells = cells[0] // (2 * num_kv_heads)
    head_dim = cache.shape[1] // (2 * num_kv_heads)
    num_heads = queries.shape[2] // head_dim
    out = torch.empty_like(queries)
    for sequence in range(len(queries)):
        keys_values = (cache if cells is None else cache[cells[sequence]]).view(-1, 2, num_kv_heads, head_dim)
        for head in range(num_heads):
            columns = slice(head * head_dim, (head + 1) * head_dim)
            keys, values = keys_values[:, :, head // (num_heads // num_kv_heads)].unbind(1)
            scores = queries[sequence, :, columns] @ keys.T * scale
            if cap is not None:
                scores = (scores / cap).tanh() * cap
            if mask is not None:
                scores = scores + mask[sequence]
            out[sequence, :, columns] = scores.float().softmax(-1).to(values.dtype) @ values
    return out


def decode_attention(
    queries: Tensor, cache: Tensor, block_table: Tensor, seq_lens: Tensor,
    block_size: int, num_kv_heads: int, scale: float, window: int, cap: float | None = None,
) -> Tensor:  # fmt: skip
    starts = torch.arange(len(queries) + 1)
    return chunk_attention(queries, cache, block_table, starts, seq_lens, block_size, num_kv_heads, scale, window, cap)


def chunk_attention(
    queries: Tensor, cache: Tensor, block_table: Tensor, query_start: Tensor, seq_lens: Tensor,
    block_size: int, num_kv_heads: int, scale: float, window: int, cap: float | None = None,
) -> Tensor:  # fmt: skip
    out = torch.zeros_like(queries, memory_format=torch.contiguous_format)
    borders = query_start.tolist()
    for sequence, num_keys in enumerate(seq_lens.tolist()):
        start, end = borders[sequence], borders[sequence + 1]
        for token in range(start, end if num_keys else start):
            position = num_keys - (end - token)
            keys = torch.arange(max(0, position + 1 - window), position + 1, device=queries.device)
            cells = block_table[sequence].long()[keys // block_size] * block_size + keys % block_size
            query = queries[token].view(1, 1, -1)
            out[token] = _attend(query, cache, cells.view(1, -1), None, num_kv_heads, scale, cap)
    return out
