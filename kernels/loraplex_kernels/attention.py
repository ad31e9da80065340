"""Attention over the paged cache."""

import torch
from torch import Tensor

from loraplex_kernels.cpu import attention as _cpu
from loraplex_kernels.cpu import decode as _cpu_decode
from loraplex_kernels.dispatch import has_gpu_forms, on_gpu
from loraplex_kernels.kv_cache import HeadNorms, rotate_and_store
from loraplex_kernels.lora_pages import RowDelta
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


def split_counters(device: torch.device) -> Tensor | None:
    """What `decode_attention` counts with on a GPU, for one cache: zeros, and zeros again after each call."""
    if not has_gpu_forms(device):
        return None
    from loraplex_kernels.gpu import attention as _gpu  # Triton exists on GPU machines only

    return torch.zeros(_gpu.NUM_COUNTERS, dtype=torch.int32, device=device)


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
    cap: float | None = None,
    counters: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Let each of P sequences' one query attend to its cached keys, of which it sees the last `window`.

    queries: [P, num_heads * head_dim], rows may be apart; cache: [cells, 2 * num_kv_heads * head_dim], keys first;
    block_table: [P, max_blocks] int32, dense, the blocks of each sequence in order; seq_lens: [P] int32, keys of each,
    1 or more (on a GPU 0 gives zeros). Head h reads key head h // (num_heads / num_kv_heads). With `cap` a score s is
    bent to cap * tanh(s / cap). Returns [P, num_heads * head_dim].

    On a GPU only: `counters`, from `split_counters`, for calls one after the other, else each makes its own; and `out`,
    [P, num_heads * head_dim], is where the answer is written, rows may be apart.
    """
    if on_gpu(cache):
        from loraplex_kernels.gpu import attention as _gpu  # Triton exists on GPU machines only

        return _gpu.decode_attention(
            queries, cache, block_table, seq_lens, block_size, num_kv_heads, scale, window, cap, counters, out
        )
    if cap is None:
        return _cpu_decode.decode_attention(
            queries, cache, block_table, seq_lens, block_size, num_kv_heads, scale, window
        )
    return _reference.decode_attention(
        queries, cache, block_table, seq_lens, block_size, num_kv_heads, scale, window, cap
    )


def turn_and_decode(
    qkv: Tensor, cos: Tensor, signed_sin: Tensor, cache: Tensor, slot_mapping: Tensor, block_table: Tensor,
    seq_lens: Tensor, *, num_heads: int, head_dim: int, block_size: int, num_kv_heads: int, scale: float, window: int,
    cap: float | None = None, delta: RowDelta | None = None, norms: HeadNorms | None = None,
    counters: Tensor | None = None, are_neighbours: bool = False,
) -> Tensor:  # fmt: skip
    """`rotate_and_store`, then `decode_attention`; on a GPU in one launch, which leaves `qkv` as it is.

    A row of `qkv` is a sequence's newest token, of which `seq_lens` counts the key. Norms are those of single heads.
    Rows of no keys store nothing there. Returns [P, num_heads * head_dim].
    """
    if on_gpu(cache):
        from loraplex_kernels.gpu import attention as _gpu  # Triton exists on GPU machines only

        return _gpu.turn_and_decode(
            qkv, cos, signed_sin, cache, slot_mapping, block_table, seq_lens, num_heads, head_dim, block_size,
            num_kv_heads, scale, window, cap, delta, norms, counters, are_neighbours=are_neighbours,
        )  # fmt: skip
    rotate_and_store(
        qkv, cos, signed_sin, cache, slot_mapping, num_heads, head_dim, delta, norms, are_neighbours=are_neighbours
    )
    return decode_attention(
        qkv[:, : num_heads * head_dim], cache, block_table, seq_lens,
        block_size=block_size, num_kv_heads=num_kv_heads, scale=scale, window=window, cap=cap,
    )  # fmt: skip


def chunk_attention(
    queries: Tensor, cache: Tensor, block_table: Tensor, query_start: Tensor, seq_lens: Tensor,
    *, max_query_len: int, block_size: int, num_kv_heads: int, scale: float, window: int, cap: float | None = None,
) -> Tensor:  # fmt: skip
    """Let the queries of P sequences attend straight to their blocks: a query sees keys up to its own position.

    queries: [T, num_heads * head_dim], rows may be apart, the last of each sequence's tokens; query_start: [P + 1]
    int32, where each sequence's rows start; no sequence has more than `max_query_len`. The rest as in
    `decode_attention`. Rows of no sequence hold no meaning. Returns [T, num_heads * head_dim].
    """
    if on_gpu(cache):
        from loraplex_kernels.gpu import attention as _gpu  # Triton exists on GPU machines only

        return _gpu.chunk_attention(
            queries, cache, block_table, query_start, seq_lens,
            max_query_len, block_size, num_kv_heads, scale, window, cap,
        )  # fmt: skip
    return _reference.chunk_attention(
        queries, cache, block_table, query_start, seq_lens, block_size, num_kv_heads, scale, window, cap
    )
