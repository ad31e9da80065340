"""Norms in Triton: one program a row, or a group of a row, held in registers as a whole."""

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from loraplex_kernels.gpu.delta import TABLES, delta_arguments, rank_of

if TYPE_CHECKING:
    from loraplex_kernels.lora_pages import RowDelta
    from loraplex_kernels.norm import Norm


@triton.jit
def _scaled(x, weight, size, eps):
    mean = tl.sum(x * x, 0) / size
    return x / tl.sqrt(mean + eps) * weight.to(tl.float32)


@triton.jit
def _norm(x, row_stride, weight, weight_stride, out, out_stride, size, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1)
    column = tl.arange(0, BLOCK)
    is_column = column < size
    numbers = tl.load(x + row * row_stride + group * size + column, mask=is_column, other=0.0).to(tl.float32)
    # Loaded before the sum, which every warp waits for, and not after it.
    weights = tl.load(weight + group * weight_stride + column, mask=is_column, other=0.0)
    scaled = _scaled(numbers, weights, size, eps)
    tl.store(out + row * out_stride + group * size + column, scaled.to(out.dtype.element_ty), mask=is_column)


@triton.jit(do_not_specialize_on_alignment=TABLES)
def _add_norm(
    x, delta, row_slots, ranks, rank_stride, residual, share, weight, bias, eps, post_weight, post_eps, out, size,
    HAS_DELTA: tl.constexpr, HAS_POST: tl.constexpr, HAS_NORM: tl.constexpr, IS_CENTRED: tl.constexpr,
    HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    is_column = column < size
    cell = row * size + column
    # All loads stand before the first that waits for another, and before the sums, which every warp waits for.
    total = tl.load(x + cell, mask=is_column, other=0.0).to(tl.float32)
    rest = tl.load(residual + cell, mask=is_column, other=0.0)
    if HAS_POST:
        post_weights = tl.load(post_weight + column, mask=is_column, other=0.0)
    if HAS_NORM:
        weights = tl.load(weight + column, mask=is_column, other=0.0)
        if HAS_BIAS:
            biases = tl.load(bias + column, mask=is_column, other=0.0)
    if HAS_DELTA:
        is_touched = rank_of(row_slots, ranks, rank_stride, row, 0) > 0
        total += tl.load(delta + cell, mask=is_column & is_touched, other=0.0).to(tl.float32)
    if HAS_POST:
        total = _scaled(total, post_weights, size, post_eps)
    total = total * share + rest.to(tl.float32)
    kept = total.to(residual.dtype.element_ty)
    tl.store(residual + cell, kept, mask=is_column)
    if HAS_NORM:
        numbers = kept.to(tl.float32)
        if IS_CENTRED:
            numbers = tl.where(is_column, numbers - tl.sum(numbers, 0) / size, 0.0)
        normed = _scaled(numbers, weights, size, eps)
        if HAS_BIAS:
            normed += biases.to(tl.float32)
        tl.store(out + cell, normed.to(out.dtype.element_ty), mask=is_column)


@triton.jit(do_not_specialize_on_alignment=TABLES)
def _square(
    qkv, delta, row_slots, ranks, rank_stride, out, query_size, key_size, width,
    HAS_DELTA: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    kind = tl.program_id(1)
    start = kind * query_size
    end = start + tl.where(kind == 0, query_size, key_size)
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(start, end, BLOCK):
        column = first + tl.arange(0, BLOCK)
        numbers = tl.load(qkv + row * width + column, mask=column < end, other=0.0).to(tl.float32)
        if HAS_DELTA:
            if rank_of(row_slots, ranks, rank_stride, row, kind if PARTS == 3 else 0) > 0:
                numbers += tl.load(delta + row * width + column, mask=column < end, other=0.0).to(tl.float32)
        total += numbers * numbers
    tl.store(out + row * 2 + kind, tl.sum(total, 0))


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    out = x.new_empty(x.shape)
    _launch(x, weight, 0, out, x.shape[1], 1, eps)
    return out


def rms_norm_groups(x: Tensor, weight: Tensor, group_size: int, eps: float) -> None:
    _launch(x, weight, group_size, x, group_size, x.shape[1] // group_size, eps)


def _launch(x: Tensor, weight: Tensor, weight_stride: int, out: Tensor, size: int, num_groups: int, eps: float) -> None:
    if len(x):
        block = triton.next_power_of_2(size)
        _norm[(len(x), num_groups)](
            x, x.stride(0), weight, weight_stride, out, out.stride(0), size, eps, BLOCK=block, num_warps=_warps(block)
        )


def add_norm(
    x: Tensor, residual: Tensor, norm: "Norm | None",
    delta: "RowDelta | None" = None, post: "Norm | None" = None, share: float = 1.0,
) -> Tensor:  # fmt: skip
    out = residual if norm is None else x.new_empty(x.shape)
    if len(x):
        block = triton.next_power_of_2(x.shape[1])
        _add_norm[(len(x),)](
            x, *delta_arguments(delta, x), residual, share,
            x if norm is None else norm.weight, x if norm is None or norm.bias is None else norm.bias,
            0.0 if norm is None else norm.eps,
            x if post is None else post.weight, 0.0 if post is None else post.eps, out, x.shape[1],
            HAS_DELTA=delta is not None, HAS_POST=post is not None, HAS_NORM=norm is not None,
            IS_CENTRED=norm is not None and norm.is_centred, HAS_BIAS=norm is not None and norm.bias is not None,
            BLOCK=block, num_warps=_warps(block),
        )  # fmt: skip
    return out


def head_squares(qkv: Tensor, sizes: tuple[int, int], delta: "RowDelta | None" = None) -> Tensor:
    out = torch.empty(len(qkv), 2, dtype=torch.float32, device=qkv.device)
    if len(qkv):
        _square[(len(qkv), 2)](
            qkv, *delta_arguments(delta, qkv), out, *sizes, qkv.shape[1],
            HAS_DELTA=delta is not None, PARTS=1 if delta is None else delta.num_parts, BLOCK=1024,
        )  # fmt: skip
    return out


def _warps(block: int) -> int:
    return min(8, max(1, block // 512))
