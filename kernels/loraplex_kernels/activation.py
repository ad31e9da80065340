"""Gated activations."""

from torch import Tensor

from loraplex_kernels.cpu import activation as _cpu
from loraplex_kernels.reference import activation as _reference


def silu_and_mul(gate_up: Tensor) -> Tensor:
    """Return silu(gate) * up; `gate_up` [T, 2 * size], dense, holds the gate first. Returns [T, size]."""
    return _cpu.silu_and_mul(gate_up) if gate_up.is_cpu else _reference.silu_and_mul(gate_up)


def gelu_tanh_and_mul(gate_up: Tensor) -> Tensor:
    """Return gelu(gate) * up with gelu's tanh form; `gate_up` [T, 2 * size] as in `silu_and_mul`. Returns [T, size]."""
    return _cpu.gelu_tanh_and_mul(gate_up) if gate_up.is_cpu else _reference.gelu_tanh_and_mul(gate_up)


def gelu_and_mul(gate_up: Tensor) -> Tensor:
    """Return gelu(gate) * up with the exact gelu; `gate_up` [T, 2 * size] as in `silu_and_mul`. Returns [T, size]."""
    return _reference.gelu_and_mul(gate_up)
