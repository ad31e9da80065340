"""Log-probabilities to report: those of the likeliest tokens and those of given tokens; for GPUs."""

from torch import Tensor

from loraplex_kernels.dispatch import on_gpu
from loraplex_kernels.reference import top_tokens as _reference
from loraplex_kernels.row_state import Tops


def top_tokens(scores: Tensor, lines: Tensor, counts: Tensor, logsums: Tensor, tops: Tops) -> None:
    """The `counts` highest scores of some lines, the lower id first where several are equal; fewer where others are
    -inf.

    scores: [L, vocab], float, a line dense; lines, counts: [N] int32, counts from 1 to the width of `tops`; logsums:
    [L] float32, what is taken from a line's scores.
    """
    if on_gpu(scores):
        from loraplex_kernels.gpu import top_tokens as _gpu  # Triton exists on GPU machines only

        _gpu.top_tokens(scores, lines, counts, logsums, tops)
    else:
        _reference.top_tokens(scores, lines, counts, logsums, tops)


def given_tokens(logits: Tensor, token_ids: Tensor, logsums: Tensor, logprobs: Tensor) -> None:
    """The log-probability of a given token under each line of logits, and each line's log of the sum of exponentials.

    logits: [N, vocab], float, a line dense; token_ids: [N] int64; logsums, logprobs: [N] float32, written.
    """
    if on_gpu(logits):
        from loraplex_kernels.gpu import top_tokens as _gpu  # Triton exists on GPU machines only

        _gpu.given_tokens(logits, token_ids, logsums, logprobs)
    else:
        _reference.given_tokens(logits, token_ids, logsums, logprobs)
