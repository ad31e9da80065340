"""RMSNorm in Triton: one program a row, or a group of a row, held in registers as a whole."""

from typing import TYPE_CHECKING

import triton
import triton.language as tl
from torch import Tensor

from loraplex_kernels.gpu.delta import TABLES, delta_arguments, rank_of

if TYPE_CHECKING:
    from loraplex_kernels.lora_pages import RowDelta


@triton.jit
def _scaled(x, weight, column, is_column, size, eps):
    mean = tl.sum(x * x, 0) / size
    return x / tl.sqrt(mean + eps) * tl.load(weight + column, mask=is_column, other=0.0).to(tl.float32)


@triton.jit
def _norm(x, row_stride, weight, weight_stride, out, out_stride, size, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1)
    column = tl.arange(0, BLOCK)
    is_column = column < size
    numbers = tl.load(x + row * row_stride + group * size + column, mask=is_column, other=0.0).to(tl.float32)
    scaled = _scaled(numbers, weight + group * weight_stride, column, is_column, size, eps)
    tl.store(out + row * out_stride + group * size + column, scaled.to(out.dtype.element_ty), mask=is_column)


@triton.jit(do_not_specialize_on_alignment=TABLES)
def _add_norm(
    x, delta, row_slots, ranks, rank_stride, residual, weight, post_weight, out, size, eps,
    HAS_DELTA: tl.constexpr, HAS_POST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    is_column = column < size
    cell = row * size + column
    total = tl.load(x + cell, mask=is_column, other=0.0).to(tl.float32)
    if HAS_DELTA:
        if rank_of(row_slots, ranks, rank_stride, row, 0) > 0:
            total += tl.load(delta + cell, mask=is_column, other=0.0).to(tl.float32)
    if HAS_POST:
        total = _scaled(total, post_weight, column, is_column, size, eps)
    total += tl.load(residual + cell, mask=is_column, other=0.0).to(tl.float32)
    kept = total.to(residual.dtype.element_ty)
    tl.store(residual + cell, kept, mask=is_column)
    scaled = _scaled(kept.to(tl.float32), weight, column, is_column, size, eps)
    tl.store(out + cell, scaled.to(out.dtype.element_ty), mask=is_column)


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


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float,
    delta: "RowDelta | None" = None, post_weight: Tensor | None = None,
) -> Tensor:  # fmt: skip
    out = x.new_empty(x.shape)
    if len(x):
        block = triton.next_power_of_2(x.shape[1])
        _add_norm[(len(x),)](
            x, *delta_arguments(delta, x), residual, weight, weight if post_weight is None else post_weight, out,
            x.shape[1], eps, HAS_DELTA=delta is not None, HAS_POST=post_weight is not None,
            BLOCK=block, num_warps=_warps(block),
        )  # fmt: skip
    return out


def _warps(block: int) -> int:
    return min(8, max(1, block // 512))
