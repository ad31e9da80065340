"""Choosing the most likely tokens."""

from torch import Tensor

from loraplex_kernels.cpu import choice as _cpu
from loraplex_kernels.dispatch import on_gpu
from loraplex_kernels.reference import choice as _reference
from loraplex_kernels.row_state import Chosen, RowState


def most_likely(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The most likely token of each row, the lowest id on ties, and its natural-log probability.

    logits: [rows, vocab]. Returns [rows] int64 and [rows] float32. A row with a NaN, with +inf, or with nothing but
    -inf has the token -1 and the log-probability 0.
    """
    if on_gpu(logits):
        from loraplex_kernels.gpu import choice as _gpu  # Triton exists on GPU machines only

        return _gpu.most_likely(logits)
    return _cpu.most_likely(logits)


def choose_rows(logits: Tensor, lines: Tensor, rows: Tensor, state: RowState, chosen: Chosen) -> None:
    """`most_likely` of some lines of `logits` into `chosen`, and the rows that they belong to advanced: for GPUs.

    logits: [lines, vocab], a line dense; lines, rows, and those of `chosen`: [N], lines and rows int32. A row without
    a token stays as it was.
    """
    if on_gpu(logits):
        from loraplex_kernels.gpu import choice as _gpu  # Triton exists on GPU machines only

        _gpu.choose_rows(logits, lines, rows, state, chosen)
    else:
        _reference.choose_rows(logits, lines, rows, state, chosen)
