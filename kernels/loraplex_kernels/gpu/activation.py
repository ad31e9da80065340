"""Activations in Triton, gated and plain; the delta of a row's adapter is added on the way."""

from typing import TYPE_CHECKING

import triton
import triton.language as tl
from torch import Tensor

from loraplex_kernels.gpu.delta import TABLES, delta_arguments, rank_of

if TYPE_CHECKING:
    from loraplex_kernels.lora_pages import RowDelta

SILU, GELU_TANH, GELU = 0, 1, 2
BLOCK = 1024


@triton.jit
def _sigmoid(x):
    # Further down it is nothing all the same, and exp would overflow.
    return tl.sigmoid(tl.maximum(x, -80.0))


@triton.jit(do_not_specialize_on_alignment=TABLES)
def _activate(
    x, delta, row_slots, ranks, rank_stride, out, size,
    KIND: tl.constexpr, IS_GATED: tl.constexpr, HAS_DELTA: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_column = column < size
    cell = row * (2 if IS_GATED else 1) * size + column
    # No load stands behind a branch that waits for another: for few rows that is most of the time.
    gate = tl.load(x + cell, mask=is_column, other=0.0).to(tl.float32)
    if IS_GATED:
        up = tl.load(x + cell + size, mask=is_column, other=0.0).to(tl.float32)
    if HAS_DELTA:
        has_gate = rank_of(row_slots, ranks, rank_stride, row, 0) > 0
        if IS_GATED:
            has_up = rank_of(row_slots, ranks, rank_stride, row, PARTS - 1) > 0
            up += tl.load(delta + cell + size, mask=is_column & has_up, other=0.0).to(tl.float32)
        gate += tl.load(delta + cell, mask=is_column & has_gate, other=0.0).to(tl.float32)
    if KIND == 0:
        active = gate * _sigmoid(gate)
    elif KIND == 1:
        # 0.5 * (1 + tanh(z)) is sigmoid(2 z), with z = sqrt(2 / pi) * (gate + 0.044715 * gate ** 3).
        active = gate * _sigmoid(1.5957691216 * (gate + 0.044715 * gate * gate * gate))
    else:
        active = gate * 0.5 * (1.0 + tl.erf(gate * 0.7071067812))
    if IS_GATED:
        active *= up
    tl.store(out + row * size + column, active.to(out.dtype.element_ty), mask=is_column)


def _run(x: Tensor, delta: "RowDelta | None", kind: int, *, is_gated: bool) -> Tensor:
    num_rows, size = x.shape
    if is_gated:
        size //= 2
    out = x.new_empty(num_rows, size)
    if num_rows:
        _activate[(num_rows, triton.cdiv(size, BLOCK))](
            x, *delta_arguments(delta, x), out, size,
            KIND=kind, IS_GATED=is_gated, HAS_DELTA=delta is not None, PARTS=1 if delta is None else delta.num_parts,
            BLOCK=BLOCK,
        )  # fmt: skip
    return out


def silu_and_mul(gate_up: Tensor, delta: "RowDelta | None" = None) -> Tensor:
    return _run(gate_up, delta, SILU, is_gated=True)


def gelu_tanh_and_mul(gate_up: Tensor, delta: "RowDelta | None" = None) -> Tensor:
    return _run(gate_up, delta, GELU_TANH, is_gated=True)


def gelu_and_mul(gate_up: Tensor, delta: "RowDelta | None" = None) -> Tensor:
    return _run(gate_up, delta, GELU, is_gated=True)


def silu(x: Tensor, delta: "RowDelta | None" = None) -> Tensor:
    return _run(x, delta, SILU, is_gated=False)


def gelu_tanh(x: Tensor, delta: "RowDelta | None" = None) -> Tensor:
    return _run(x, delta, GELU_TANH, is_gated=False)


def gelu(x: Tensor, delta: "RowDelta | None" = None) -> Tensor:
    return _run(x, delta, GELU, is_gated=False)
