"""Choosing tokens."""

from torch import Tensor

from loraplex_kernels.cpu import choice as _cpu
from loraplex_kernels.dispatch import on_gpu


def most_likely(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The most likely token of each row, the lowest id on ties, and its natural-log probability.

    logits: [rows, vocab]. Returns [rows] int64 and [rows] float32. A row with a NaN, with +inf, or with nothing but
    -inf has the token -1 and the log-probability 0.
    """
    if on_gpu(logits):
        from loraplex_kernels.gpu import choice as _gpu  # Triton exists on GPU machines only

        return _gpu.most_likely(logits)
    return _cpu.most_likely(logits)
