"""Gated activations in Triton; the delta of a row's adapter is added on the way."""

from typing import TYPE_CHECKING

import triton
import triton.language as tl
from torch import Tensor

from loraplex_kernels.gpu.delta import TABLES, delta_arguments, rank_of

if TYPE_CHECKING:
    from loraplex_kernels.lora_pages import RowDelta

SILU, GELU_TANH, GELU = 0, 1, 2
BLOCK = 1024


@triton.jit(do_not_specialize_on_alignment=TABLES)
def _gate(
    gate_up, delta, row_slots, ranks, rank_stride, out, size,
    KIND: tl.constexpr, HAS_DELTA: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_column = column < size
    cell = row * 2 * size + column
    gate = tl.load(gate_up + cell, mask=is_column, other=0.0).to(tl.float32)
    up = tl.load(gate_up + cell + size, mask=is_column, other=0.0).to(tl.float32)
    if HAS_DELTA:
        if rank_of(row_slots, ranks, rank_stride, row, 0) > 0:
            gate += tl.load(delta + cell, mask=is_column, other=0.0).to(tl.float32)
        if rank_of(row_slots, ranks, rank_stride, row, PARTS - 1) > 0:
            up += tl.load(delta + cell + size, mask=is_column, other=0.0).to(tl.float32)
    if KIND == 0:
        active = gate * tl.sigmoid(gate)
    elif KIND == 1:
        # 0.5 * (1 + tanh(z)) is sigmoid(2 z), with z = sqrt(2 / pi) * (gate + 0.044715 * gate ** 3).
        active = gate * tl.sigmoid(1.5957691216 * (gate + 0.044715 * gate * gate * gate))
    else:
        active = gate * 0.5 * (1.0 + tl.erf(gate * 0.7071067812))
    tl.store(out + row * size + column, (active * up).to(out.dtype.element_ty), mask=is_column)


def _run(gate_up: Tensor, delta: "RowDelta | None", kind: int) -> Tensor:
    num_rows, width = gate_up.shape
    out = gate_up.new_empty(num_rows, width // 2)
    if num_rows:
        _gate[(num_rows, triton.cdiv(width // 2, BLOCK))](
            gate_up, *delta_arguments(delta, gate_up), out, width // 2,
            KIND=kind, HAS_DELTA=delta is not None, PARTS=1 if delta is None else delta.num_parts, BLOCK=BLOCK,
        )  # fmt: skip
    return out


def silu_and_mul(gate_up: Tensor, delta: "RowDelta | None" = None) -> Tensor:
    return _run(gate_up, delta, SILU)


def gelu_tanh_and_mul(gate_up: Tensor, delta: "RowDelta | None" = None) -> Tensor:
    return _run(gate_up, delta, GELU_TANH)


def gelu_and_mul(gate_up: Tensor, delta: "RowDelta | None" = None) -> Tensor:
    return _run(gate_up, delta, GELU)
