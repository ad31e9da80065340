"""Attention of decoding sequences, one query each, straight from their blocks: nothing is gathered, copied or padded.

Heads that share a key head are computed up to four together, so that a key is read and widened once for all of them.
The functions for one to four heads are written out, since only then do the running sums stay in registers: that, and a
head size known to the compiler, make this three times as fast as loops over heads.
"""

import struct

import numpy as np
import torch
from torch import Tensor

from loraplex_kernels.cpu.compiled import exp, floats, halves, inline, ints, is_compiled, jit, load, longs, store
from loraplex_kernels.cpu.team import ChunkFunction, process_team

# Keys over all sequences from which on torch's products, copies included, are faster.
MAX_KEYS = 4096
MAX_TOGETHER = 4


@inline
def _score_1(queries, keys, size, scores, place):
    sum_0 = np.float32(0)
    for i in range(size):
        sum_0 += queries[0, i] * load(keys[i])
    scores[0, place] = sum_0


@inline
def _score_2(queries, keys, size, scores, place):
    sum_0 = sum_1 = np.float32(0)
    for i in range(size):
        number = load(keys[i])
        sum_0 += queries[0, i] * number
        sum_1 += queries[1, i] * number
    scores[0, place], scores[1, place] = sum_0, sum_1


@inline
def _score_3(queries, keys, size, scores, place):
    sum_0 = sum_1 = sum_2 = np.float32(0)
    for i in range(size):
        number = load(keys[i])
        sum_0 += queries[0, i] * number
        sum_1 += queries[1, i] * number
        sum_2 += queries[2, i] * number
    scores[0, place], scores[1, place], scores[2, place] = sum_0, sum_1, sum_2


@inline
def _score_4(queries, keys, size, scores, place):
    sum_0 = sum_1 = sum_2 = sum_3 = np.float32(0)
    for i in range(size):
        number = load(keys[i])
        sum_0 += queries[0, i] * number
        sum_1 += queries[1, i] * number
        sum_2 += queries[2, i] * number
        sum_3 += queries[3, i] * number
    scores[0, place], scores[1, place], scores[2, place], scores[3, place] = sum_0, sum_1, sum_2, sum_3


@inline
def _add_1(weights, place, values, size, totals):
    weight_0 = weights[0, place]
    for i in range(size):
        totals[0, i] += weight_0 * load(values[i])


@inline
def _add_2(weights, place, values, size, totals):
    weight_0, weight_1 = weights[0, place], weights[1, place]
    for i in range(size):
        number = load(values[i])
        totals[0, i] += weight_0 * number
        totals[1, i] += weight_1 * number


@inline
def _add_3(weights, place, values, size, totals):
    weight_0, weight_1, weight_2 = weights[0, place], weights[1, place], weights[2, place]
    for i in range(size):
        number = load(values[i])
        totals[0, i] += weight_0 * number
        totals[1, i] += weight_1 * number
        totals[2, i] += weight_2 * number


@inline
def _add_4(weights, place, values, size, totals):
    weight_0, weight_1, weight_2, weight_3 = weights[0, place], weights[1, place], weights[2, place], weights[3, place]
    for i in range(size):
        number = load(values[i])
        totals[0, i] += weight_0 * number
        totals[1, i] += weight_1 * number
        totals[2, i] += weight_2 * number
        totals[3, i] += weight_3 * number


def _attention_of(num_heads, score, add, fixed_head_dim):
    """The loop over the keys of one sequence for `num_heads` heads; `fixed_head_dim` 0: of any size."""

    @jit
    def attend(queries, cache, cells, num_keys, key_column, value_column, head_dim, scores, totals):
        size = fixed_head_dim if fixed_head_dim > 0 else head_dim
        for place in range(num_keys):
            score(queries, cache[cells[place], key_column : key_column + size], size, scores, place)
        for head in range(num_heads):
            highest = scores[head, 0]
            for place in range(num_keys):
                highest = max(highest, scores[head, place])
            sum_of_weights = np.float32(0)
            for place in range(num_keys):
                scores[head, place] = exp(scores[head, place] - highest)
                sum_of_weights += scores[head, place]
            for place in range(num_keys):
                scores[head, place] /= sum_of_weights
            for i in range(size):
                totals[head, i] = np.float32(0)
        for place in range(num_keys):
            add(scores, place, cache[cells[place], value_column : value_column + size], size, totals)

    return attend


def _for_heads_of(fixed_head_dim):
    attend_1 = _attention_of(1, _score_1, _add_1, fixed_head_dim)
    attend_2 = _attention_of(2, _score_2, _add_2, fixed_head_dim)
    attend_3 = _attention_of(3, _score_3, _add_3, fixed_head_dim)
    attend_4 = _attention_of(4, _score_4, _add_4, fixed_head_dim)

    @jit
    def attend(together, queries, cache, cells, num_keys, key_column, value_column, head_dim, scores, totals):
        if together == 1:
            attend_1(queries, cache, cells, num_keys, key_column, value_column, head_dim, scores, totals)
        elif together == 2:
            attend_2(queries, cache, cells, num_keys, key_column, value_column, head_dim, scores, totals)
        elif together == 3:
            attend_3(queries, cache, cells, num_keys, key_column, value_column, head_dim, scores, totals)
        else:
            attend_4(queries, cache, cells, num_keys, key_column, value_column, head_dim, scores, totals)

    return attend


_attend_64, _attend_128, _attend_any = _for_heads_of(64), _for_heads_of(128), _for_heads_of(0)


@jit
def _attend_for_key_head(
    queries, cache, blocks, first, num_keys, kv_head, block_size, num_kv_heads, head_dim, scale, out
):  # fmt: skip
    """The heads that share one key head, for one sequence's query; queries and out: [width]; blocks: [max_blocks]."""
    num_shared = out.shape[0] // (num_kv_heads * head_dim)
    cells = np.empty(num_keys, np.int64)
    for place in range(num_keys):
        position = first + place
        cells[place] = blocks[position // block_size] * block_size + position % block_size
    scores = np.empty((MAX_TOGETHER, num_keys), np.float32)
    some_queries = np.empty((MAX_TOGETHER, head_dim), np.float32)
    totals = np.empty((MAX_TOGETHER, head_dim), np.float32)
    key, value = kv_head * head_dim, (num_kv_heads + kv_head) * head_dim
    for first_shared in range(0, num_shared, MAX_TOGETHER):
        together = min(MAX_TOGETHER, num_shared - first_shared)
        column = (kv_head * num_shared + first_shared) * head_dim
        for head in range(together):
            for i in range(head_dim):
                some_queries[head, i] = load(queries[column + head * head_dim + i]) * scale
        if head_dim == 64:
            _attend_64(together, some_queries, cache, cells, num_keys, key, value, 64, scores, totals)
        elif head_dim == 128:
            _attend_128(together, some_queries, cache, cells, num_keys, key, value, 128, scores, totals)
        else:
            _attend_any(together, some_queries, cache, cells, num_keys, key, value, head_dim, scores, totals)
        for head in range(together):
            for i in range(head_dim):
                out[column + head * head_dim + i] = store(totals[head, i], out[0])


@ChunkFunction
def _attention_chunk(numbers, chunk):
    """One key head of one sequence."""
    sizes = longs(numbers, 16)
    is_half, queries, query_stride, num_sequences, width, cache = (
        sizes[0],
        sizes[1],
        sizes[2],
        sizes[3],
        sizes[4],
        sizes[5],
    )
    num_cells, block_table, num_blocks, seq_lens = sizes[6], sizes[7], sizes[8], sizes[9]
    window, block_size, num_kv_heads, head_dim, out = sizes[10], sizes[11], sizes[12], sizes[13], sizes[14]
    scale = np.float32(sizes[15:16].view(np.float64)[0])
    sequence, kv_head = chunk // num_kv_heads, chunk % num_kv_heads
    blocks = ints(block_table, (num_sequences, num_blocks))[sequence]
    length = ints(seq_lens, num_sequences)[sequence]
    first = max(0, length - window)
    rows, cells, result = (
        (num_sequences, query_stride),
        (num_cells, 2 * num_kv_heads * head_dim),
        (num_sequences, width),
    )
    if is_half:
        _attend_for_key_head(
            halves(queries, rows)[sequence], halves(cache, cells), blocks, first, length - first, kv_head, block_size,
            num_kv_heads, head_dim, scale, halves(out, result)[sequence],
        )  # fmt: skip
    else:
        _attend_for_key_head(
            floats(queries, rows)[sequence], floats(cache, cells), blocks, first, length - first, kv_head, block_size,
            num_kv_heads, head_dim, scale, floats(out, result)[sequence],
        )  # fmt: skip


_LAYOUT = struct.Struct("16qd")


def is_fast(num_keys: int, dtype: torch.dtype) -> bool:
    """Whether `decode_attention` is the fastest form for that many keys over all sequences."""
    return is_compiled(dtype) and num_keys <= MAX_KEYS


def decode_attention(
    queries: Tensor, cache: Tensor, block_table: Tensor, seq_lens: Tensor,
    block_size: int, num_kv_heads: int, scale: float, window: int,
) -> Tensor:  # fmt: skip
    num_sequences, width = queries.shape
    num_cells, cell_width = cache.shape
    out = queries.new_empty(num_sequences, width)
    process_team().run(
        _LAYOUT, num_sequences * num_kv_heads, _attention_chunk.address, queries.dtype is torch.bfloat16,
        queries.data_ptr(), queries.stride(0), num_sequences, width, cache.data_ptr(), num_cells,
        block_table.data_ptr(), block_table.shape[1], seq_lens.data_ptr(), window, block_size, num_kv_heads,
        cell_width // (2 * num_kv_heads), out.data_ptr(), scale,
    )  # fmt: skip
    return out
