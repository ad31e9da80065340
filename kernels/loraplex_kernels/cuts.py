"""Cutting a row's scores to the tokens that may be drawn, without sorting: for GPUs."""

from torch import Tensor

from loraplex_kernels.dispatch import on_gpu
from loraplex_kernels.reference import cuts as _reference
from loraplex_kernels.sampling_inputs import Cuts


def cut_scores(scores: Tensor, cuts: Cuts, token_ids: Tensor) -> None:
    """Cut rows to the tokens that may be drawn, in place; what is cut becomes -inf.

    scores: [places, vocab] float32, dense; token_ids: [places] int64, below 0 where a row's scores are broken: those
    rows are left. One after the other: the `top_k` best tokens; the fewest of these that together reach `top_p`; those
    that are at least `least`; those whose information is closest to the row's entropy, until they reach `typical_p`
    together. The token that crosses a border stays, and so do its ties.
    """
    if on_gpu(scores):
        from loraplex_kernels.gpu import cuts as _gpu  # Triton exists on GPU machines only

        _gpu.cut_scores(scores, cuts, token_ids)
    else:
        _reference.cut_scores(scores, cuts, token_ids)
