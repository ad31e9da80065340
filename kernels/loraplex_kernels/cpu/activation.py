"""Gated activations as one compiled loop."""

import numpy as np
import torch
from torch import Tensor

from loraplex_kernels.cpu.compiled import exp, floats, halves, is_compiled, jit, load, store
from loraplex_kernels.reference import activation as _reference


@jit
def _gate(gate_up, out):
    num_rows, size = out.shape
    for row in range(num_rows):
        for i in range(size):
            gate = load(gate_up[row, i])
            up = load(gate_up[row, size + i])
            out[row, i] = store(gate / (np.float32(1) + exp(-gate)) * up, out[row, i])


@jit
def _silu_and_mul(is_half, gate_up, num_rows, size, out):
    if is_half:
        _gate(halves(gate_up, (num_rows, 2 * size)), halves(out, (num_rows, size)))
    else:
        _gate(floats(gate_up, (num_rows, 2 * size)), floats(out, (num_rows, size)))


def silu_and_mul(gate_up: Tensor) -> Tensor:
    if not is_compiled(gate_up.dtype):
        return _reference.silu_and_mul(gate_up)
    num_rows, width = gate_up.shape
    out = gate_up.new_empty(num_rows, width // 2)
    _silu_and_mul(gate_up.dtype is torch.bfloat16, gate_up.data_ptr(), num_rows, width // 2, out.data_ptr())
    return out


@jit
def _gelu_gate(gate_up, out):
    num_rows, size = out.shape
    for row in range(num_rows):
        for i in range(size):
            gate = load(gate_up[row, i])
            up = load(gate_up[row, size + i])
            # 0.5 * (1 + tanh(z)) is 1 / (1 + exp(-2 z)), with z = sqrt(2 / pi) * (gate + 0.044715 * gate ** 3).
            twice = np.float32(1.5957691216) * (gate + np.float32(0.044715) * gate * gate * gate)
            out[row, i] = store(gate / (np.float32(1) + exp(-twice)) * up, out[row, i])


@jit
def _gelu_tanh_and_mul(is_half, gate_up, num_rows, size, out):
    if is_half:
        _gelu_gate(halves(gate_up, (num_rows, 2 * size)), halves(out, (num_rows, size)))
    else:
        _gelu_gate(floats(gate_up, (num_rows, 2 * size)), floats(out, (num_rows, size)))


def gelu_tanh_and_mul(gate_up: Tensor) -> Tensor:
    if not is_compiled(gate_up.dtype):
        return _reference.gelu_tanh_and_mul(gate_up)
    num_rows, width = gate_up.shape
    out = gate_up.new_empty(num_rows, width // 2)
    _gelu_tanh_and_mul(gate_up.dtype is torch.bfloat16, gate_up.data_ptr(), num_rows, width // 2, out.data_ptr())
    return out
