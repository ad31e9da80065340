"""Activations in plain torch."""

from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor

from loraplex_kernels.reference.lora_pages import with_delta

if TYPE_CHECKING:
    from loraplex_kernels.lora_pages import RowDelta


def silu_and_mul(gate_up: Tensor, delta: "RowDelta | None" = None) -> Tensor:
    gate, up = with_delta(gate_up, delta).chunk(2, -1)
    return (F.silu(gate) * up).to(gate_up.dtype)


def gelu_tanh_and_mul(gate_up: Tensor, delta: "RowDelta | None" = None) -> Tensor:
    gate, up = with_delta(gate_up, delta).chunk(2, -1)
    return (F.gelu(gate, approximate="tanh") * up).to(gate_up.dtype)


def gelu_and_mul(gate_up: Tensor, delta: "RowDelta | None" = None) -> Tensor:
    gate, up = with_delta(gate_up, delta).chunk(2, -1)
    return (F.gelu(gate) * up).to(gate_up.dtype)


def silu(x: Tensor, delta: "RowDelta | None" = None) -> Tensor:
    return F.silu(with_delta(x, delta)).to(x.dtype)


def gelu_tanh(x: Tensor, delta: "RowDelta | None" = None) -> Tensor:
    return F.gelu(with_delta(x, delta), approximate="tanh").to(x.dtype)


def gelu(x: Tensor, delta: "RowDelta | None" = None) -> Tensor:
    return F.gelu(with_delta(x, delta)).to(x.dtype)
