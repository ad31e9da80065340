"""Cutting a row's scores to the tokens that may be drawn, without sorting: for GPUs."""

from torch import Tensor

from loraplex_kernels.dispatch import on_gpu
from loraplex_kernels.reference import cuts as _reference


def keep_top(scores: Tensor, top_k: Tensor, top_p: Tensor) -> None:
    """Cut each row to its `top_k` best tokens, then to the fewest of these that together reach `top_p`, in place.

    scores: [rows, vocab] float32, dense, with a finite number in each row; what is cut becomes -inf. top_k: [rows]
    int64, vocab for off; top_p: [rows] float32, 1 for off. The token that crosses the border stays, and so do its ties.
    """
    if on_gpu(scores):
        from loraplex_kernels.gpu import cuts as _gpu  # Triton exists on GPU machines only

        _gpu.keep_top(scores, top_k, top_p)
    else:
        _reference.keep_top(scores, top_k, top_p)


def keep_typical(scores: Tensor, typical_p: Tensor) -> None:
    """Keep the tokens whose information is closest to the row's entropy, until they reach `typical_p` together.

    As `keep_top`; typical_p: [rows] float32.
    """
    if on_gpu(scores):
        from loraplex_kernels.gpu import cuts as _gpu  # Triton exists on GPU machines only

        _gpu.keep_typical(scores, typical_p)
    else:
        _reference.keep_typical(scores, typical_p)
