"""RMSNorm as one compiled loop: torch's own takes eight operations on a CPU."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from loraplex_kernels.cpu.compiled import floats, halves, is_compiled, jit, load, store
from loraplex_kernels.reference import norm as _reference


@jit
def _normalise(x, weight, eps, out):
    num_rows, size = x.shape
    for row in range(num_rows):
        total = np.float32(0)
        for i in range(size):
            number = load(x[row, i])
            total += number * number
        scale = np.float32(1) / np.sqrt(total / np.float32(size) + np.float32(eps))
        for i in range(size):
            out[row, i] = store(load(x[row, i]) * scale * load(weight[i]), x[row, i])


@jit
def _rms_norm(is_half, x, num_rows, size, weight, eps, out):
    shape = (num_rows, size)
    if is_half:
        _normalise(halves(x, shape), halves(weight, size), eps, halves(out, shape))
    else:
        _normalise(floats(x, shape), floats(weight, size), eps, floats(out, shape))


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    if not is_compiled(x.dtype):
        return F.rms_norm(x, (x.shape[1],), weight, eps)
    out = torch.empty_like(x)
    num_rows, size = x.shape
    _rms_norm(x.dtype is torch.bfloat16, x.data_ptr(), num_rows, size, weight.data_ptr(), eps, out.data_ptr())
    return out


@jit
def _normalise_groups(x, weight, group_size, eps):
    for row in range(x.shape[0]):
        for first in range(0, weight.shape[0], group_size):
            total = np.float32(0)
            for i in range(first, first + group_size):
                number = load(x[row, i])
                total += number * number
            scale = np.float32(1) / np.sqrt(total / np.float32(group_size) + np.float32(eps))
            for i in range(first, first + group_size):
                x[row, i] = store(load(x[row, i]) * scale * load(weight[i]), x[row, i])


@jit
def _rms_norm_groups(is_half, x, num_rows, stride, weight, width, group_size, eps):
    # The last row may end before a whole stride: nothing beyond its width is touched.
    if is_half:
        _normalise_groups(halves(x, (num_rows, stride)), halves(weight, width), group_size, eps)
    else:
        _normalise_groups(floats(x, (num_rows, stride)), floats(weight, width), group_size, eps)


def rms_norm_groups(x: Tensor, weight: Tensor, group_size: int, eps: float) -> None:
    if not is_compiled(x.dtype):
        _reference.rms_norm_groups(x, weight, group_size, eps)
        return
    num_rows, width = x.shape
    _rms_norm_groups(
        x.dtype is torch.bfloat16, x.data_ptr(), num_rows, x.stride(0), weight.data_ptr(), width, group_size, eps
    )
