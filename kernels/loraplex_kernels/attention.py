"""Attention over the paged cache."""

import torch
from torch import Tensor

from loraplex_kernels.cpu import attention as _cpu
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
