"""Attention over the paged cache."""

import torch
from torch import Tensor

from loraplex_kernels.cpu import attention as _cpu
from loraplex_kernels.cpu import decode as _cpu_decode
from loraplex_kernels.reference import attention as _reference


def order_cells(cells: Tensor, num_queries: int, num_kv_heads: int, dtype: torch.dtype) -> Tensor:
    """Return cells [P, K] as `paged_attention` reads them fastest in a cache of `dtype`; good for all layers of a step.

    Either as they are, or [2 * num_kv_heads, P, K] int64: the rows of single heads, cell * 2 * num_kv_heads + head.
    """
    return _cpu.order_cells(cells, num_queries, num_kv_heads, dtype) if cells.is_cpu else cells


def paged_attention(
    queries: Tensor, cache: Tensor, cells: Tensor | None, mask: Tensor | None, num_kv_heads: int, scale: float
) -> Tensor:
    """Let each of P sequences' N queries attend to its K cached keys.

    queries: [P, N, num_heads * head_dim]; cache: [cells, 2 * num_kv_heads * head_dim], keys first; cells: [P, K] int64,
    the cell of each key, or what `order_cells` made of it, or None for one sequence whose keys are all of `cache`, in
    order; mask: [P, N, K], 0 where a query sees a key and -inf where it does not, or None where all see all. Head h
    reads key head h // (num_heads / num_kv_heads). Returns [P, N, num_heads * head_dim].
    """
    if cache.is_cpu:
        return _cpu.paged_attention(queries, cache, cells, mask, num_kv_heads, scale)
    return _reference.paged_attention(queries, cache, cells, mask, num_kv_heads, scale)


def capped_attention(
    queries: Tensor, cache: Tensor, cells: Tensor | None, mask: Tensor | None,
    *, num_kv_heads: int, scale: float, cap: float,
) -> Tensor:  # fmt: skip
    """As `paged_attention`, with each score s = scale * query . key bent to cap * tanh(s / cap) before the mask."""
    return _cpu.capped_attention(queries, cache, cells, mask, num_kv_heads, scale, cap)


def is_decode_fast(num_keys: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether `decode_attention` is the fastest form for sequences with that many keys in all, on that device."""
    return device.type == "cpu" and _cpu_decode.is_fast(num_keys, dtype)


def decode_attention(
    queries: Tensor,
    cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    *,
    block_size: int,
    num_kv_heads: int,
    scale: float,
    window: int,
) -> Tensor:
    """Let each of P sequences' one query attend to its cached keys, of which it sees the last `window`.

    queries: [P, num_heads * head_dim], rows may be apart; cache: [cells, 2 * num_kv_heads * head_dim], keys first;
    block_table: [P, max_blocks] int32, dense, the blocks of each sequence in order; seq_lens: [P] int32, keys of each,
    1 or more. Head h reads key head h // (num_heads / num_kv_heads). Returns [P, num_heads * head_dim].
    """
    operation = _cpu_decode.decode_attention if cache.is_cpu else _reference.decode_attention
    return operation(queries, cache, block_table, seq_lens, block_size, num_kv_heads, scale, window)
