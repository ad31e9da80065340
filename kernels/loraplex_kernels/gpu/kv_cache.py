"""Rotary embedding, the norms of queries and keys, and the write to the paged cache, in one Triton kernel.

A program turns one head of one token. It holds the two halves that are turned together in two registers of the same
place, so each thread writes only what it has read itself, and the turning in place needs no barrier.
"""

from typing import TYPE_CHECKING

import triton
import triton.language as tl
from torch import Tensor

from loraplex_kernels.gpu.delta import TABLES, delta_arguments, rank_of

if TYPE_CHECKING:
    from loraplex_kernels.kv_cache import HeadNorms
    from loraplex_kernels.lora_pages import RowDelta


@triton.jit(do_not_specialize_on_alignment=TABLES)
def _rotate_and_store(
    qkv, delta, row_slots, ranks, rank_stride, cos, signed_sin, cache, cells, query_weight, key_weight, eps,
    squares, query_width, key_width, num_heads, num_kv_heads,
    HEAD_DIM: tl.constexpr, TURNED: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr,
    HAS_DELTA: tl.constexpr, PARTS: tl.constexpr, HAS_NORMS: tl.constexpr, HAS_SQUARES: tl.constexpr,
    ARE_NEIGHBOURS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    kind = (head >= num_heads).to(tl.int32) + (head >= num_heads + num_kv_heads).to(tl.int32)
    start = (token * (num_heads + 2 * num_kv_heads) + head) * HEAD_DIM
    i = tl.arange(0, HALF)
    is_half = i < TURNED // 2
    # Of each pair the angle's place in its table, and that of the element in the head.
    first_angle, second_angle = i, i + TURNED // 2
    j = second_angle
    if ARE_NEIGHBOURS:
        i, j = 2 * i, 2 * i + 1
    k = TURNED + tl.arange(0, REST)
    is_rest = k < HEAD_DIM
    first = tl.load(qkv + start + i, mask=is_half, other=0.0).to(tl.float32)
    second = tl.load(qkv + start + j, mask=is_half, other=0.0).to(tl.float32)
    rest = tl.load(qkv + start + k, mask=is_rest, other=0.0).to(tl.float32)
    # Values are not turned. What does not wait for the adapter's tables is loaded before what does.
    angle = token * TURNED
    is_turned = is_half & (kind < 2)
    first_cos = tl.load(cos + angle + first_angle, mask=is_turned, other=0.0).to(tl.float32)
    second_cos = tl.load(cos + angle + second_angle, mask=is_turned, other=0.0).to(tl.float32)
    first_sin = tl.load(signed_sin + angle + first_angle, mask=is_turned, other=0.0).to(tl.float32)
    second_sin = tl.load(signed_sin + angle + second_angle, mask=is_turned, other=0.0).to(tl.float32)
    cell = tl.load(cells + token)
    if HAS_DELTA:
        is_touched = rank_of(row_slots, ranks, rank_stride, token, kind if PARTS == 3 else 0) > 0
        first += tl.load(delta + start + i, mask=is_half & is_touched, other=0.0).to(tl.float32)
        second += tl.load(delta + start + j, mask=is_half & is_touched, other=0.0).to(tl.float32)
        rest += tl.load(delta + start + k, mask=is_rest & is_touched, other=0.0).to(tl.float32)
    if kind < 2:
        if HAS_NORMS:
            if HAS_SQUARES:
                total = tl.load(squares + token * 2 + kind)
                width = tl.where(kind == 0, query_width, key_width)
            else:
                total = tl.sum(first * first, 0) + tl.sum(second * second, 0) + tl.sum(rest * rest, 0)
                width = HEAD_DIM
            scale = 1.0 / tl.sqrt(total / width + eps)
            weight = query_weight + head * HEAD_DIM
            if kind == 1:
                weight = key_weight + (head - num_heads) * HEAD_DIM
            first *= scale * tl.load(weight + i, mask=is_half, other=0.0).to(tl.float32)
            second *= scale * tl.load(weight + j, mask=is_half, other=0.0).to(tl.float32)
            rest *= scale * tl.load(weight + k, mask=is_rest, other=0.0).to(tl.float32)
        turned_first = first * first_cos + second * first_sin
        second = second * second_cos + first * second_sin
        first = turned_first
    number = qkv.dtype.element_ty
    tl.store(qkv + start + i, first.to(number), mask=is_half)
    tl.store(qkv + start + j, second.to(number), mask=is_half)
    tl.store(qkv + start + k, rest.to(number), mask=is_rest)
    if kind > 0:
        # Keys of all heads come first in a cell, then the values: the order that heads have in qkv.
        target = cache + (cell * 2 * num_kv_heads + head - num_heads) * HEAD_DIM
        tl.store(target + i, first.to(number), mask=is_half)
        tl.store(target + j, second.to(number), mask=is_half)
        tl.store(target + k, rest.to(number), mask=is_rest)


def rotate_and_store(
    qkv: Tensor, cos: Tensor, signed_sin: Tensor, cache: Tensor, slot_mapping: Tensor, num_heads: int, head_dim: int,
    delta: "RowDelta | None" = None, norms: "HeadNorms | None" = None, *, are_neighbours: bool = False,
) -> None:  # fmt: skip
    squares = None if norms is None else norms.squares
    widths = (0, 0) if norms is None else norms.widths
    num_tokens, width = qkv.shape
    if num_tokens == 0:
        return
    turned = cos.shape[1]
    num_all = width // head_dim
    _rotate_and_store[(num_tokens, num_all)](
        qkv, *delta_arguments(delta, qkv), cos, signed_sin, cache, slot_mapping,
        qkv if norms is None else norms.query_weight, qkv if norms is None else norms.key_weight,
        0.0 if norms is None else norms.eps, qkv if squares is None else squares, *widths,
        num_heads, (num_all - num_heads) // 2,
        HEAD_DIM=head_dim, TURNED=turned, HALF=triton.next_power_of_2(max(turned // 2, 1)),
        REST=triton.next_power_of_2(max(head_dim - turned, 1)),
        HAS_DELTA=delta is not None, PARTS=1 if delta is None else delta.num_parts, HAS_NORMS=norms is not None,
        HAS_SQUARES=squares is not None, ARE_NEIGHBOURS=are_neighbours, num_warps=1,
    )  # fmt: skip
