"""Attention over the paged cache."""

from torch import Tensor

from loraplex_kernels.cpu import attention as _cpu
from loraplex_kernels.reference import attention as _reference


def paged_attention(
    queries: Tensor, cache: Tensor, cells: Tensor, mask: Tensor | None, num_kv_heads: int, scale: float
) -> Tensor:
    """Let each of P sequences' N queries attend to its K cached keys.

    queries: [P, N, num_heads * head_dim]; cache: [cells, 2 * num_kv_heads * head_dim], keys first; cells: [P, K] int64,
    the cell of each key; mask: [P, N, K], 0 where a query sees a key and -inf where it does not, or None where all see
    all. Head h reads key head h // (num_heads / num_kv_heads). Returns [P, N, num_heads * head_dim].
    """
    if cache.is_cpu:
        return _cpu.paged_attention(queries, cache, cells, mask, num_kv_heads, scale)
    return _reference.paged_attention(queries, cache, cells, mask, num_kv_heads, scale)
