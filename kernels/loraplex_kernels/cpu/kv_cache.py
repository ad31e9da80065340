"""Rotary embedding and the write to the paged cache as one compiled loop."""

import torch
from torch import Tensor

from loraplex_kernels.cpu.compiled import floats, halves, is_compiled, jit, load, longs, store
from loraplex_kernels.reference import kv_cache as _reference


@jit
def _rotate_tokens(qkv, num_rotated, head_dim, cos, signed_sin, cache, cells, query_width):
    num_tokens, width = qkv.shape
    half = cos.shape[1] // 2
    for token in range(num_tokens):
        for head in range(num_rotated):
            start = head * head_dim
            for i in range(half):
                first, second = load(qkv[token, start + i]), load(qkv[token, start + half + i])
                turned_first = first * load(cos[token, i]) + second * load(signed_sin[token, i])
                turned_second = second * load(cos[token, half + i]) + first * load(signed_sin[token, half + i])
                qkv[token, start + i] = store(turned_first, qkv[token, start])
                qkv[token, start + half + i] = store(turned_second, qkv[token, start])
        for i in range(width - query_width):
            cache[cells[token], i] = qkv[token, query_width + i]


@jit
def _rotate_and_store(
    is_half, qkv, num_tokens, width, num_heads, num_kv_heads, head_dim, cos, signed_sin, turned, cache, num_cells, cells
):
    query_width = num_heads * head_dim
    rows, angles, stored = (num_tokens, width), (num_tokens, turned), (num_cells, width - query_width)
    num_rotated = num_heads + num_kv_heads
    where = longs(cells, num_tokens)
    if is_half:
        _rotate_tokens(
            halves(qkv, rows), num_rotated, head_dim, halves(cos, angles), halves(signed_sin, angles),
            halves(cache, stored), where, query_width,
        )  # fmt: skip
    else:
        _rotate_tokens(
            floats(qkv, rows), num_rotated, head_dim, floats(cos, angles), floats(signed_sin, angles),
            floats(cache, stored), where, query_width,
        )  # fmt: skip


def rotate_and_store(
    qkv: Tensor, cos: Tensor, signed_sin: Tensor, cache: Tensor, slot_mapping: Tensor, num_heads: int, head_dim: int
) -> None:
    if not is_compiled(qkv.dtype):
        _reference.rotate_and_store(qkv, cos, signed_sin, cache, slot_mapping, num_heads, head_dim)
        return
    num_tokens, width = qkv.shape
    num_kv_heads = (width // head_dim - num_heads) // 2
    _rotate_and_store(
        qkv.dtype is torch.bfloat16, qkv.data_ptr(), num_tokens, width, num_heads, num_kv_heads, head_dim,
        cos.data_ptr(), signed_sin.data_ptr(), cos.shape[1], cache.data_ptr(), len(cache), slot_mapping.data_ptr(),
    )  # fmt: skip
