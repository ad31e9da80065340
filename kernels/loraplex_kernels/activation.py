"""Activations, gated and plain."""

from torch import Tensor

from loraplex_kernels.cpu import activation as _cpu
from loraplex_kernels.dispatch import on_gpu
from loraplex_kernels.lora_pages import RowDelta
from loraplex_kernels.reference import activation as _reference


def silu_and_mul(gate_up: Tensor, delta: RowDelta | None = None) -> Tensor:
    """Return silu(gate) * up; `gate_up` [T, 2 * size], dense, holds the gate first. Returns [T, size].

    With `delta` it is added to `gate_up` first; it has two parts, gate and up, or one for both.
    """
    if on_gpu(gate_up):
        from loraplex_kernels.gpu import activation as _gpu  # Triton exists on GPU machines only

        return _gpu.silu_and_mul(gate_up, delta)
    if delta is not None:
        return _reference.silu_and_mul(gate_up, delta)
    return _cpu.silu_and_mul(gate_up)


def gelu_tanh_and_mul(gate_up: Tensor, delta: RowDelta | None = None) -> Tensor:
    """Return gelu(gate) * up with gelu's tanh form; arguments as in `silu_and_mul`. Returns [T, size]."""
    if on_gpu(gate_up):
        from loraplex_kernels.gpu import activation as _gpu  # Triton exists on GPU machines only

        return _gpu.gelu_tanh_and_mul(gate_up, delta)
    if delta is not None:
        return _reference.gelu_tanh_and_mul(gate_up, delta)
    return _cpu.gelu_tanh_and_mul(gate_up)


def gelu_and_mul(gate_up: Tensor, delta: RowDelta | None = None) -> Tensor:
    """Return gelu(gate) * up with the exact gelu; arguments as in `silu_and_mul`. Returns [T, size]."""
    if on_gpu(gate_up):
        from loraplex_kernels.gpu import activation as _gpu  # Triton exists on GPU machines only

        return _gpu.gelu_and_mul(gate_up, delta)
    return _reference.gelu_and_mul(gate_up, delta)


def silu(x: Tensor, delta: RowDelta | None = None) -> Tensor:
    """Return silu(x), [T, size]; x: [T, size], dense, to which `delta`, of one part, is added first."""
    if on_gpu(x):
        from loraplex_kernels.gpu import activation as _gpu  # Triton exists on GPU machines only

        return _gpu.silu(x, delta)
    return _reference.silu(x, delta)


def gelu_tanh(x: Tensor, delta: RowDelta | None = None) -> Tensor:
    """Return gelu(x) in its tanh form; arguments and result as of `silu`."""
    if on_gpu(x):
        from loraplex_kernels.gpu import activation as _gpu  # Triton exists on GPU machines only

        return _gpu.gelu_tanh(x, delta)
    return _reference.gelu_tanh(x, delta)


def gelu(x: Tensor, delta: RowDelta | None = None) -> Tensor:
    """Return gelu(x) in its exact form; arguments and result as of `silu`."""
    if on_gpu(x):
        from loraplex_kernels.gpu import activation as _gpu  # Triton exists on GPU machines only

        return _gpu.gelu(x, delta)
    return _reference.gelu(x, delta)
