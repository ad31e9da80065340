"""Attention over the paged cache in Triton, straight from the blocks.

The heads that share a key head are rows of one product, so a key is read once for all of them. Decoding is split over
the keys of a sequence, and whichever of its programs is done last weights the parts together; a chunk of a prompt is
cut into tiles of queries. Only the keys at the border of what a tile's rows see are masked. Everything that differs
between steps (lengths, blocks) is read on the device: a captured graph stays valid. A decode may also turn its own
queries and newest key, and store what `rotate_and_store` would: then that launch is saved.

Scores are powers of two: the scale holds log2(e).
"""

import math
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from loraplex_kernels.gpu.attention_tiles import chunk_tile, decode_keys
from loraplex_kernels.gpu.delta import delta_arguments
from loraplex_kernels.gpu.turned_heads import rank_of_part, turned_heads

if TYPE_CHECKING:
    from loraplex_kernels.kv_cache import HeadNorms
    from loraplex_kernels.lora_pages import RowDelta

NO_WINDOW = 1 << 30
LOG2_E = math.log2(math.e)
# Programs that one sequence and key head are split over when there are few sequences.
MAX_SPLITS = 16
WANTED_PROGRAMS = 264  # two for each processor of an H100 or H200
NUM_COUNTERS = WANTED_PROGRAMS // 2  # where there are more sequences and key heads, none is split
MOST_AT_ONCE = 8192  # numbers of parts that a program holds to weight them: 64 a thread
# Keys and values of one step of the loop are on their way while the last one's are taken in, and before them the
# numbers of their blocks: with 2 each step would first wait for those.
NUM_STAGES = 3
# What differs from step to step must not decide which code a step runs: each variant is compiled when it is first met.
CHANGING = ("table_stride", "window")
TABLES = ("block_table", "query_start", "seq_lens", "counters", "row_slots", "ranks")


@triton.jit
def _attend(
    q, cache, blocks, first_key, last_key, lowest, highest, key_column, value_column, cell_size, scale, cap,
    highest_score, total, gathered,
    HAS_END: tl.constexpr, HAS_BORDERS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, DIMS: tl.constexpr, KEYS: tl.constexpr, HAS_CAP: tl.constexpr,
):  # fmt: skip
    """Take in the keys first_key to last_key - 1, which without HAS_END are a multiple of KEYS.

    With HAS_BORDERS row r sees those from lowest[r] to highest[r] of them, else all rows see all.
    """
    d = tl.arange(0, DIMS)
    for start in range(first_key, last_key, KEYS):
        position = start + tl.arange(0, KEYS)
        is_cell = (d < HEAD_DIM)[None, :]
        if HAS_END:
            is_key = position < last_key
            is_cell = is_cell & is_key[:, None]
            block = tl.load(blocks + position // BLOCK_SIZE, mask=is_key, other=0)
        else:
            block = tl.load(blocks + position // BLOCK_SIZE)
        cell = (block.to(tl.int64) * BLOCK_SIZE + position % BLOCK_SIZE) * cell_size
        place = cell[:, None] + d[None, :]
        keys = tl.load(cache + key_column + place, mask=is_cell, other=0.0)
        values = tl.load(cache + value_column + place, mask=is_cell, other=0.0)
        scores = tl.dot(q, tl.trans(keys), input_precision="ieee")
        factor = scale
        if HAS_CAP:
            scores = cap * (2.0 * tl.sigmoid(scale * scores) - 1.0)
            factor = 1.0
        if HAS_END:
            scores = tl.where(is_key[None, :], scores, float("-inf"))
        if HAS_BORDERS:
            is_seen = (position[None, :] >= lowest[:, None]) & (position[None, :] <= highest[:, None])
            scores = tl.where(is_seen, scores, float("-inf"))
        new_highest = tl.maximum(highest_score, tl.max(scores, 1) * factor)
        shift = new_highest
        if HAS_BORDERS:
            # A row that has seen no key yet has nothing to subtract: 2 ** (-inf + inf) is no number.
            shift = tl.where(new_highest == float("-inf"), 0.0, new_highest)
        weights = tl.exp2(scores * factor - shift[:, None])
        faded = tl.exp2(highest_score - shift)
        total = total * faded + tl.sum(weights, 1)
        gathered = tl.dot(weights.to(values.dtype), values, gathered * faded[:, None], input_precision="ieee")
        highest_score = new_highest
    return highest_score, total, gathered


@triton.jit(do_not_specialize=CHANGING, do_not_specialize_on_alignment=TABLES)
def _decode(
    queries, query_stride, cache, cell_size, block_table, table_stride, seq_lens, scale, cap, window,
    out, out_stride, parts, part_highest, part_total, counters, num_kv_heads,
    delta, row_slots, ranks, rank_stride, cos, signed_sin, cells, query_weight, key_weight, eps,
    SHARED: tl.constexpr, ROWS: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, DIMS: tl.constexpr, KEYS: tl.constexpr, HAS_CAP: tl.constexpr,
    JOINED_ROWS: tl.constexpr, AT_ONCE: tl.constexpr, TURNED: tl.constexpr, HAS_DELTA: tl.constexpr,
    PARTS: tl.constexpr, HAS_NORMS: tl.constexpr, ARE_NEIGHBOURS: tl.constexpr,
):  # fmt: skip
    """With TURNED `queries` is all of qkv as the linear made it, and each sequence's newest key is not in the cache."""
    sequence = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    num_keys = tl.load(seq_lens + sequence)
    first = tl.maximum(num_keys - window, 0)
    span = tl.maximum(tl.cdiv(tl.cdiv(num_keys - first, SPLITS), KEYS), 1) * KEYS
    num_parts = 1
    if SPLITS > 1:
        num_parts = tl.maximum(tl.cdiv(num_keys - first, span), 1)
    if split >= num_parts:
        return
    start = first + split * span
    end = tl.minimum(start + span, num_keys)
    row = tl.arange(0, ROWS)
    is_row = row < SHARED
    d = tl.arange(0, DIMS)
    is_dim = d < HEAD_DIM
    head = kv_head * SHARED + row
    is_cell = is_row[:, None] & is_dim[None, :]
    place = head[:, None] * HEAD_DIM + d[None, :]
    row_start = queries + sequence * query_stride
    blocks = block_table + sequence * table_stride
    key_column, value_column = kv_head * HEAD_DIM, (num_kv_heads + kv_head) * HEAD_DIM
    highest = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    gathered = tl.zeros((ROWS, DIMS), tl.float32)
    if TURNED > 0:
        deltas = delta + sequence * query_stride
        angles, sines = cos + sequence * TURNED, signed_sin + sequence * TURNED
        rank = rank_of_part(row_slots, ranks, rank_stride, sequence, 0, HAS_DELTA, PARTS)
        q = turned_heads(
            row_start, kv_head * SHARED + tl.minimum(row, SHARED - 1), deltas, rank, angles, sines, query_weight, eps,
            HEAD_DIM, DIMS, TURNED, HAS_DELTA, HAS_NORMS, ARE_NEIGHBOURS,
        ).to(cache.dtype.element_ty)  # fmt: skip
        if (split == num_parts - 1) & (num_keys > 0):
            # The newest key and value: stored for later steps, and taken in from here.
            end -= 1
            num_heads = num_kv_heads * SHARED
            rank = rank_of_part(row_slots, ranks, rank_stride, sequence, 1, HAS_DELTA, PARTS)
            key = turned_heads(
                row_start, num_heads + kv_head + tl.arange(0, 1), deltas, rank, angles, sines,
                key_weight - num_heads * HEAD_DIM, eps,
                HEAD_DIM, DIMS, TURNED, HAS_DELTA, HAS_NORMS, ARE_NEIGHBOURS,
            ).to(cache.dtype.element_ty)  # fmt: skip
            value_place = (num_heads + num_kv_heads + kv_head) * HEAD_DIM + d[None, :]
            value = tl.load(row_start + value_place, mask=is_dim[None, :], other=0.0)
            if HAS_DELTA:
                if rank_of_part(row_slots, ranks, rank_stride, sequence, 2, HAS_DELTA, PARTS) > 0:
                    added = tl.load(deltas + value_place, mask=is_dim[None, :], other=0.0).to(tl.float32)
                    value = (value.to(tl.float32) + added).to(cache.dtype.element_ty)
            own = cache + tl.load(cells + sequence) * cell_size + d[None, :]
            tl.store(own + key_column, key, mask=is_dim[None, :])
            tl.store(own + value_column, value, mask=is_dim[None, :])
            highest = tl.sum(q.to(tl.float32) * key.to(tl.float32), 1) * scale
            if HAS_CAP:
                highest = cap * (2.0 * tl.sigmoid(highest) - 1.0)
            total += 1.0
            gathered += value.to(tl.float32)
    else:
        q = tl.load(row_start + place, mask=is_cell, other=0.0)
    highest, total, gathered = _attend(
        q, cache, blocks, start, end, row, row, key_column, value_column, cell_size, scale, cap,
        highest, total, gathered, True, False, BLOCK_SIZE, HEAD_DIM, DIMS, KEYS, HAS_CAP,
    )  # fmt: skip
    number = out.dtype.element_ty
    if num_parts == 1:
        # A row that stands in for none in a captured graph has no keys: it gives zeros.
        gathered = gathered / tl.where(total > 0, total, 1.0)[:, None]
        tl.store(out + sequence * out_stride + place, gathered.to(number), mask=is_cell)
    else:
        part = (sequence * num_kv_heads * SHARED + head) * SPLITS + split
        tl.store(part_highest + part, highest, mask=is_row)
        tl.store(part_total + part, total, mask=is_row)
        tl.store(parts + part[:, None] * HEAD_DIM + d[None, :], gathered, mask=is_cell)
        # All threads have stored before one of them says so; who finds all others there sees what they stored.
        tl.debug_barrier()
        counter = counters + sequence * num_kv_heads + kv_head
        if tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == num_parts - 1:
            tl.store(counter, 0)  # for the next launch
            first_part = (sequence * num_kv_heads + kv_head) * SHARED * SPLITS
            answer = _join(
                parts, part_highest, part_total, first_part, num_parts,
                SHARED, SPLITS, HEAD_DIM, DIMS, JOINED_ROWS, AT_ONCE,
            )  # fmt: skip
            joined = tl.arange(0, JOINED_ROWS)
            column = (kv_head * SHARED + joined)[:, None] * HEAD_DIM + d[None, :]
            is_column = (joined < SHARED)[:, None] & is_dim[None, :]
            tl.store(out + sequence * out_stride + column, answer.to(number), mask=is_column)


@triton.jit
def _join(
    parts, part_highest, part_total, first_part, num_parts,
    SHARED: tl.constexpr, SPLITS: tl.constexpr, HEAD_DIM: tl.constexpr, DIMS: tl.constexpr,
    JOINED_ROWS: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """Weight the parts of one sequence's heads together, [JOINED_ROWS, DIMS]; each part has seen at least one key."""
    row = tl.minimum(tl.arange(0, JOINED_ROWS), SHARED - 1)
    d = tl.arange(0, DIMS)
    top = tl.full((JOINED_ROWS,), float("-inf"), tl.float32)
    whole = tl.zeros((JOINED_ROWS,), tl.float32)
    answer = tl.zeros((JOINED_ROWS, DIMS), tl.float32)
    for first in range(0, num_parts, AT_ONCE):
        part = first + tl.arange(0, AT_ONCE)
        is_part = (part < num_parts)[:, None]
        place = first_part + row[None, :] * SPLITS + part[:, None]
        # Other processors wrote these: they are read past the cache that is this one's own.
        highest = tl.load(part_highest + place, mask=is_part, other=float("-inf"), cache_modifier=".cg")
        total = tl.load(part_total + place, mask=is_part, other=0.0, cache_modifier=".cg")
        is_cell = is_part[:, :, None] & (d < HEAD_DIM)[None, None, :]
        cell = place[:, :, None] * HEAD_DIM + d[None, None, :]
        some = tl.load(parts + cell, mask=is_cell, other=0.0, cache_modifier=".cg")
        new_top = tl.maximum(top, tl.max(highest, 0))
        weight = tl.exp2(highest - new_top[None, :])
        faded = tl.exp2(top - new_top)
        whole = whole * faded + tl.sum(total * weight, 0)
        answer = answer * faded[:, None] + tl.sum(some * weight[:, :, None], 0)
        top = new_top
    return answer / whole[:, None]


@triton.jit(do_not_specialize=(*CHANGING, "num_sequences"), do_not_specialize_on_alignment=TABLES)
def _chunks(
    queries, query_stride, cache, cell_size, block_table, table_stride, query_start, seq_lens, scale, cap, window,
    out, out_stride, num_sequences, num_kv_heads,
    SHARED: tl.constexpr, QUERIES: tl.constexpr, ROWS: tl.constexpr, HAS_WINDOW: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, DIMS: tl.constexpr, KEYS: tl.constexpr, HAS_CAP: tl.constexpr,
):  # fmt: skip
    # The last tiles see most keys: they begin first, so that the others fill up the end of the launch.
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    kv_head = program % num_kv_heads
    sequence = (program // num_kv_heads % num_sequences).to(tl.int64)
    first_query = program // num_kv_heads // num_sequences * QUERIES
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
    lowest = position - window + 1
    end = before + tl.minimum(first_query + QUERIES, num_queries)
    blocks = block_table + sequence * table_stride
    key_column, value_column = kv_head * HEAD_DIM, (num_kv_heads + kv_head) * HEAD_DIM
    highest_score = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    gathered = tl.zeros((ROWS, DIMS), tl.float32)
    full_start = 0
    if HAS_WINDOW:
        # From the first key that any row sees to a multiple of KEYS where the last row begins to see.
        start = tl.maximum(before + first_query - window + 1, 0)
        full_start = start + tl.cdiv(tl.maximum(end - window - start, 0), KEYS) * KEYS
        highest_score, total, gathered = _attend(
            q, cache, blocks, start, tl.minimum(full_start, end), lowest, position, key_column, value_column, cell_size,
            scale, cap, highest_score, total, gathered, True, True, BLOCK_SIZE, HEAD_DIM, DIMS, KEYS, HAS_CAP,
        )  # fmt: skip
    full_end = full_start + tl.maximum(before + first_query + 1 - full_start, 0) // KEYS * KEYS
    highest_score, total, gathered = _attend(
        q, cache, blocks, full_start, full_end, lowest, position, key_column, value_column,
        cell_size, scale, cap, highest_score, total, gathered, False, False, BLOCK_SIZE, HEAD_DIM, DIMS, KEYS, HAS_CAP,
    )  # fmt: skip
    _, total, gathered = _attend(
        q, cache, blocks, full_end, end, lowest, position, key_column, value_column,
        cell_size, scale, cap, highest_score, total, gathered, True, True, BLOCK_SIZE, HEAD_DIM, DIMS, KEYS, HAS_CAP,
    )  # fmt: skip
    gathered = gathered / tl.where(total > 0, total, 1.0)[:, None]
    tl.store(out + token[:, None] * out_stride + place, gathered.to(out.dtype.element_ty), mask=is_cell)


def decode_attention(
    queries: Tensor, cache: Tensor, block_table: Tensor, seq_lens: Tensor,
    block_size: int, num_kv_heads: int, scale: float, window: int, cap: float | None = None,
    counters: Tensor | None = None, out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    if out is None:
        out = queries.new_empty(queries.shape)
    idle = (queries, queries, queries, 0, queries, queries, queries, queries, queries, 0.0)
    _decode_rows(
        queries, cache, block_table, seq_lens, block_size, num_kv_heads, scale, window, cap, counters, out, idle,
        TURNED=0, HAS_DELTA=False, PARTS=1, HAS_NORMS=False, ARE_NEIGHBOURS=False,
    )  # fmt: skip
    return out


def turn_and_decode(
    qkv: Tensor, cos: Tensor, signed_sin: Tensor, cache: Tensor, slot_mapping: Tensor, block_table: Tensor,
    seq_lens: Tensor, num_heads: int, head_dim: int, block_size: int, num_kv_heads: int, scale: float, window: int,
    cap: float | None = None, delta: "RowDelta | None" = None, norms: "HeadNorms | None" = None,
    counters: Tensor | None = None, *, are_neighbours: bool = False,
) -> Tensor:  # fmt: skip
    out = qkv.new_empty(len(qkv), num_heads * head_dim)
    turning = (
        *delta_arguments(delta, qkv), cos, signed_sin, slot_mapping,
        qkv if norms is None else norms.query_weight, qkv if norms is None else norms.key_weight,
        0.0 if norms is None else norms.eps,
    )  # fmt: skip
    _decode_rows(
        qkv, cache, block_table, seq_lens, block_size, num_kv_heads, scale, window, cap, counters, out, turning,
        TURNED=cos.shape[1], HAS_DELTA=delta is not None, PARTS=1 if delta is None else delta.num_parts,
        HAS_NORMS=norms is not None, ARE_NEIGHBOURS=are_neighbours,
    )  # fmt: skip
    return out


def _decode_rows(
    rows: Tensor, cache: Tensor, block_table: Tensor, seq_lens: Tensor, block_size: int, num_kv_heads: int,
    scale: float, window: int, cap: float | None, counters: Tensor | None, out: Tensor,
    turning: tuple[Tensor | int | float, ...], **kind: int | bool,
) -> None:  # fmt: skip
    num_sequences, width = out.shape
    if num_sequences == 0:
        return
    cell_size = cache.shape[1]
    head_dim = cell_size // (2 * num_kv_heads)
    num_heads = width // head_dim
    shared = num_heads // num_kv_heads
    num_splits = _splits(num_sequences * num_kv_heads, block_table.shape[1] * block_size)
    parts = highest = total = out
    if num_splits > 1:
        shape = (num_sequences * num_heads, num_splits)
        parts = torch.empty(*shape, head_dim, dtype=torch.float32, device=out.device)
        highest, total = (torch.empty(shape, dtype=torch.float32, device=out.device) for _ in range(2))
    if counters is None:
        counters = torch.zeros(num_sequences * num_kv_heads, dtype=torch.int32, device=out.device)
    dims = max(16, triton.next_power_of_2(head_dim))
    joined_rows = triton.next_power_of_2(shared)
    at_once = min(num_splits, max(1, MOST_AT_ONCE // (joined_rows * dims)))
    slope, bent = _slopes(scale, cap)
    _decode[(num_sequences, num_kv_heads, num_splits)](
        rows, rows.stride(0), cache, cell_size, block_table, block_table.stride(0), seq_lens,
        slope, bent, min(window, NO_WINDOW), out, out.stride(0), parts, highest, total, counters, num_kv_heads,
        *turning, SHARED=shared, ROWS=max(16, joined_rows), SPLITS=num_splits, BLOCK_SIZE=block_size,
        HEAD_DIM=head_dim, DIMS=dims, KEYS=decode_keys(dims, out.element_size()), HAS_CAP=cap is not None,
        JOINED_ROWS=joined_rows, AT_ONCE=at_once, **kind, num_warps=4, num_stages=NUM_STAGES,
    )  # fmt: skip


def chunk_attention(
    queries: Tensor, cache: Tensor, block_table: Tensor, query_start: Tensor, seq_lens: Tensor,
    max_query_len: int, block_size: int, num_kv_heads: int, scale: float, window: int, cap: float | None = None,
) -> Tensor:  # fmt: skip
    num_tokens, width = queries.shape
    out = queries.new_empty(num_tokens, width)
    cell_size = cache.shape[1]
    head_dim = cell_size // (2 * num_kv_heads)
    shared = width // head_dim // num_kv_heads
    dims = max(16, triton.next_power_of_2(head_dim))
    tile = chunk_tile(dims, queries.element_size(), queries.device)
    rows = max(tile.rows, triton.next_power_of_2(shared))
    num_queries = rows // shared
    slope, bent = _slopes(scale, cap)
    _chunks[(triton.cdiv(max_query_len, num_queries) * len(seq_lens) * num_kv_heads,)](
        queries, queries.stride(0), cache, cell_size, block_table, block_table.stride(0), query_start, seq_lens,
        slope, bent, min(window, NO_WINDOW), out, out.stride(0), len(seq_lens), num_kv_heads,
        SHARED=shared, QUERIES=num_queries, ROWS=rows, HAS_WINDOW=window < NO_WINDOW,
        BLOCK_SIZE=block_size, HEAD_DIM=head_dim, DIMS=dims, KEYS=tile.keys, HAS_CAP=cap is not None,
        num_warps=tile.warps, num_stages=NUM_STAGES,
    )  # fmt: skip
    return out


def _slopes(scale: float, cap: float | None) -> tuple[float, float]:
    """What products become scores by: s * the first, or with a cap the second * tanh(s * the first / 2)."""
    return (scale * LOG2_E, 1.0) if cap is None else (2 * scale / cap, cap * LOG2_E)


def _splits(num_programs: int, most_keys: int) -> int:
    """A power of two: enough programs for the processors, and at least two blocks of keys for each."""
    wanted = min(MAX_SPLITS, max(1, WANTED_PROGRAMS // num_programs), max(1, most_keys // 128))
    return 1 << (wanted.bit_length() - 1)
