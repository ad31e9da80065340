"""Gated activations."""

from torch import Tensor

from loraplex_kernels.reference import activation as _reference


def silu_and_mul(gate_up: Tensor) -> Tensor:
    """Return silu(gate) * up, where `gate_up` [T, 2 * size] holds the gate's columns first; returns [T, size]."""
    return _reference.silu_and_mul(gate_up)
