"""Attention over the paged cache in Triton, straight from the blocks.

The heads that share a key head are rows of one product, so a key is read once for all of them. Decoding is split over
the keys of a sequence, and the parts are weighted together by a second kernel; a chunk of a prompt is cut into tiles of
queries. Everything that differs between steps (lengths, blocks) is read on the device: a captured graph stays valid.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

NO_WINDOW = 1 << 30
# Programs that one sequence and key head are split over when there are few sequences.
MAX_SPLITS = 16
WANTED_PROGRAMS = 264  # two for each processor of an H100 or H200
CHUNK_ROWS = 64
# What differs from step to step must not decide which code a step runs: each variant is compiled when it is first met.
CHANGING = ("table_stride", "window")
TABLES = ("block_table", "query_start", "seq_lens")


@triton.jit
def _attend(
    q, cache, blocks, first_key, last_key, lowest, highest, is_row, key_column, value_column, cell_size, scale, cap,
    highest_score, total, gathered,
    BLOCK_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, DIMS: tl.constexpr, KEYS: tl.constexpr, HAS_CAP: tl.constexpr,
):  # fmt: skip
    """Take in the keys first_key to last_key - 1, of which row r sees those from lowest[r] to highest[r]."""
    d = tl.arange(0, DIMS)
    is_dim = d < HEAD_DIM
    for start in range(first_key, last_key, KEYS):
        position = start + tl.arange(0, KEYS)
        is_key = position < last_key
        block = tl.load(blocks + position // BLOCK_SIZE, mask=is_key, other=0).to(tl.int64)
        cell = (block * BLOCK_SIZE + position % BLOCK_SIZE) * cell_size
        is_cell = is_key[:, None] & is_dim[None, :]
        keys = tl.load(cache + cell[:, None] + key_column + d[None, :], mask=is_cell, other=0.0)
        scores = tl.dot(q, tl.trans(keys), input_precision="ieee") * scale
        if HAS_CAP:
            scores = cap * (2.0 * tl.sigmoid(2.0 * scores / cap) - 1.0)
        is_seen = (position[None, :] >= lowest[:, None]) & (position[None, :] <= highest[:, None]) & is_row[:, None]
        scores = tl.where(is_seen & is_key[None, :], scores, float("-inf"))
        new_highest = tl.maximum(highest_score, tl.max(scores, 1))
        # A row that has seen no key yet has nothing to subtract: exp(-inf - 0) is 0, exp(-inf + inf) is no number.
        shift = tl.where(new_highest == float("-inf"), 0.0, new_highest)
        weights = tl.exp(scores - shift[:, None])
        faded = tl.exp(highest_score - shift)
        total = total * faded + tl.sum(weights, 1)
        values = tl.load(cache + cell[:, None] + value_column + d[None, :], mask=is_cell, other=0.0)
        gathered = tl.dot(weights.to(values.dtype), values, gathered * faded[:, None], input_precision="ieee")
        highest_score = new_highest
    return highest_score, total, gathered


@triton.jit(do_not_specialize=CHANGING, do_not_specialize_on_alignment=TABLES)
def _decode(
    queries, query_stride, cache, cell_size, block_table, table_stride, seq_lens, scale, cap, window,
    parts, part_highest, part_total, num_kv_heads,
    SHARED: tl.constexpr, ROWS: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, DIMS: tl.constexpr, KEYS: tl.constexpr, HAS_CAP: tl.constexpr,
):  # fmt: skip
    sequence = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    num_keys = tl.load(seq_lens + sequence)
    first = tl.maximum(num_keys - window, 0)
    span = tl.cdiv(tl.cdiv(num_keys - first, SPLITS), KEYS) * KEYS
    start = first + split * span
    row = tl.arange(0, ROWS)
    is_row = row < SHARED
    d = tl.arange(0, DIMS)
    head = kv_head * SHARED + row
    is_cell = is_row[:, None] & (d < HEAD_DIM)[None, :]
    q = tl.load(queries + sequence * query_stride + head[:, None] * HEAD_DIM + d[None, :], mask=is_cell, other=0.0)
    everything = tl.zeros((ROWS,), tl.int32)
    highest, total, gathered = _attend(
        q, cache, block_table + sequence * table_stride, start, tl.minimum(start + span, num_keys),
        everything, everything + num_keys, is_row, kv_head * HEAD_DIM, (num_kv_heads + kv_head) * HEAD_DIM, cell_size,
        scale, cap, tl.full((ROWS,), float("-inf"), tl.float32), tl.zeros((ROWS,), tl.float32),
        tl.zeros((ROWS, DIMS), tl.float32), BLOCK_SIZE, HEAD_DIM, DIMS, KEYS, HAS_CAP,
    )  # fmt: skip
    cell = (sequence * num_kv_heads * SHARED + head) * SPLITS + split
    tl.store(part_highest + cell, highest, mask=is_row)
    tl.store(part_total + cell, total, mask=is_row)
    tl.store(parts + cell[:, None] * HEAD_DIM + d[None, :], gathered, mask=is_cell)


@triton.jit
def _join(parts, part_highest, part_total, out, HEAD_DIM: tl.constexpr, DIMS: tl.constexpr, SPLITS: tl.constexpr):
    cell = tl.program_id(0).to(tl.int64)  # sequence and head
    split = tl.arange(0, SPLITS)
    d = tl.arange(0, DIMS)
    is_dim = d < HEAD_DIM
    highest = tl.load(part_highest + cell * SPLITS + split)
    total = tl.load(part_total + cell * SPLITS + split)
    top = tl.max(highest, 0)
    weight = tl.where(total > 0, tl.exp(highest - tl.where(top == float("-inf"), 0.0, top)), 0.0)
    part = tl.load(parts + (cell * SPLITS + split)[:, None] * HEAD_DIM + d[None, :], mask=is_dim[None, :], other=0.0)
    whole = tl.sum(total * weight, 0)
    # A row that stands in for none in a captured graph has no keys: it gives zeros.
    gathered = tl.sum(part * weight[:, None], 0) / tl.where(whole > 0, whole, 1.0)
    tl.store(out + cell * HEAD_DIM + d, gathered.to(out.dtype.element_ty), mask=is_dim)


@triton.jit(do_not_specialize=CHANGING, do_not_specialize_on_alignment=TABLES)
def _chunks(
    queries, query_stride, cache, cell_size, block_table, table_stride, query_start, seq_lens, scale, cap, window,
    out, out_stride, num_kv_heads,
    SHARED: tl.constexpr, QUERIES: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, DIMS: tl.constexpr, KEYS: tl.constexpr, HAS_CAP: tl.constexpr,
):  # fmt: skip
    first_query = tl.program_id(0) * QUERIES
    kv_head = tl.program_id(1)
    sequence = tl.program_id(2).to(tl.int64)
    first_token = tl.load(query_start + sequence)
    num_queries = tl.load(query_start + sequence + 1) - first_token
    if first_query >= num_queries:
        return
    num_keys = tl.load(seq_lens + sequence)
    row = tl.arange(0, ROWS)
    query = first_query + row // SHARED
    head = kv_head * SHARED + row % SHARED
    is_row = (row < QUERIES * SHARED) & (query < num_queries)
    d = tl.arange(0, DIMS)
    is_cell = is_row[:, None] & (d < HEAD_DIM)[None, :]
    token = (first_token + query).to(tl.int64)
    place = head[:, None] * HEAD_DIM + d[None, :]
    q = tl.load(queries + token[:, None] * query_stride + place, mask=is_cell, other=0.0)
    before = num_keys - num_queries
    position = before + query
    start = tl.maximum(before + first_query - window + 1, 0)
    end = before + tl.minimum(first_query + QUERIES, num_queries)
    _, total, gathered = _attend(
        q, cache, block_table + sequence * table_stride, start, end, position - window + 1, position, is_row,
        kv_head * HEAD_DIM, (num_kv_heads + kv_head) * HEAD_DIM, cell_size, scale, cap,
        tl.full((ROWS,), float("-inf"), tl.float32), tl.zeros((ROWS,), tl.float32),
        tl.zeros((ROWS, DIMS), tl.float32), BLOCK_SIZE, HEAD_DIM, DIMS, KEYS, HAS_CAP,
    )  # fmt: skip
    gathered = gathered / tl.where(total > 0, total, 1.0)[:, None]
    tl.store(out + token[:, None] * out_stride + place, gathered.to(out.dtype.element_ty), mask=is_cell)


def decode_attention(
    queries: Tensor, cache: Tensor, block_table: Tensor, seq_lens: Tensor,
    block_size: int, num_kv_heads: int, scale: float, window: int, cap: float | None = None,
) -> Tensor:  # fmt: skip
    num_sequences, width = queries.shape
    out = queries.new_empty(num_sequences, width)
    if num_sequences == 0:
        return out
    cell_size = cache.shape[1]
    head_dim = cell_size // (2 * num_kv_heads)
    num_heads = width // head_dim
    shared = num_heads // num_kv_heads
    num_splits = _splits(num_sequences * num_kv_heads, block_table.shape[1] * block_size)
    shape = (num_sequences * num_heads, num_splits)
    parts = torch.empty(*shape, head_dim, dtype=torch.float32, device=queries.device)
    highest, total = (torch.empty(shape, dtype=torch.float32, device=queries.device) for _ in range(2))
    dims = max(16, triton.next_power_of_2(head_dim))
    _decode[(num_sequences, num_kv_heads, num_splits)](
        queries, queries.stride(0), cache, cell_size, block_table, block_table.stride(0), seq_lens,
        scale, cap or 1.0, min(window, NO_WINDOW), parts, highest, total, num_kv_heads,
        SHARED=shared, ROWS=max(16, triton.next_power_of_2(shared)), SPLITS=num_splits,
        BLOCK_SIZE=block_size, HEAD_DIM=head_dim, DIMS=dims, KEYS=_keys(dims), HAS_CAP=cap is not None,
        num_warps=4, num_stages=2,
    )  # fmt: skip
    _join[(num_sequences * num_heads,)](
        parts, highest, total, out, HEAD_DIM=head_dim, DIMS=dims, SPLITS=num_splits, num_warps=1
    )
    return out


def chunk_attention(
    queries: Tensor, cache: Tensor, block_table: Tensor, query_start: Tensor, seq_lens: Tensor,
    max_query_len: int, block_size: int, num_kv_heads: int, scale: float, window: int, cap: float | None = None,
) -> Tensor:  # fmt: skip
    num_tokens, width = queries.shape
    out = queries.new_empty(num_tokens, width)
    cell_size = cache.shape[1]
    head_dim = cell_size // (2 * num_kv_heads)
    shared = width // head_dim // num_kv_heads
    rows = max(CHUNK_ROWS, triton.next_power_of_2(shared))
    dims = max(16, triton.next_power_of_2(head_dim))
    num_queries = rows // shared
    _chunks[(triton.cdiv(max_query_len, num_queries), num_kv_heads, len(seq_lens))](
        queries, queries.stride(0), cache, cell_size, block_table, block_table.stride(0), query_start, seq_lens,
        scale, cap or 1.0, min(window, NO_WINDOW), out, out.stride(0), num_kv_heads,
        SHARED=shared, QUERIES=num_queries, ROWS=rows,
        BLOCK_SIZE=block_size, HEAD_DIM=head_dim, DIMS=dims, KEYS=_keys(dims), HAS_CAP=cap is not None,
        num_warps=4 if dims <= 128 else 8, num_stages=2,
    )  # fmt: skip
    return out


def _splits(num_programs: int, most_keys: int) -> int:
    """A power of two: enough programs for the processors, and at least two blocks of keys for each."""
    wanted = min(MAX_SPLITS, max(1, WANTED_PROGRAMS // num_programs), max(1, most_keys // 128))
    return 1 << (wanted.bit_length() - 1)


def _keys(dims: int) -> int:
    return 64 if dims <= 128 else 32
