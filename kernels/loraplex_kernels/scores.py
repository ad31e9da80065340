"""From logits to the scores of sampled rows: masks, biases, bans, watermark and penalties; for GPUs.

Scores are float32, [places, vocab], dense; a place is a sampled row's line in them. All work in place.
"""

from torch import Tensor

from loraplex_kernels.dispatch import on_gpu
from loraplex_kernels.reference import scores as _reference
from loraplex_kernels.row_state import RowState
from loraplex_kernels.sampling_inputs import Bans, Biases, Masks, Penalties


def copy_scores(logits: Tensor, lines: Tensor, masks: Masks | None, scores: Tensor) -> None:
    """Write some lines of `logits` to `scores`; tokens that are not in a place's mask become -inf.

    logits: [lines, vocab], a line dense; lines: [places] int32.
    """
    if on_gpu(logits):
        from loraplex_kernels.gpu import scores as _gpu  # Triton exists on GPU machines only

        _gpu.copy_scores(logits, lines, masks, scores)
    else:
        _reference.copy_scores(logits, lines, masks, scores)


def add_biases(scores: Tensor, biases: Biases) -> None:
    """Add to single scores."""
    if on_gpu(scores):
        from loraplex_kernels.gpu import scores as _gpu  # Triton exists on GPU machines only

        _gpu.add_biases(scores, biases)
    else:
        _reference.add_biases(scores, biases)


def ban_tokens(scores: Tensor, bans: Bans, state: RowState) -> None:
    """Set the scores of the banned tokens to -inf. Rows with bans that have a run must be remembered."""
    if on_gpu(scores):
        from loraplex_kernels.gpu import scores as _gpu  # Triton exists on GPU machines only

        _gpu.ban_tokens(scores, bans, state)
    else:
        _reference.ban_tokens(scores, bans, state)


def add_to_lists(scores: Tensor, lists: Masks, value: float) -> None:
    """Add `value` to the scores of the tokens in each place's list: a watermark."""
    if on_gpu(scores):
        from loraplex_kernels.gpu import scores as _gpu  # Triton exists on GPU machines only

        _gpu.add_to_lists(scores, lists, value)
    else:
        _reference.add_to_lists(scores, lists, value)


def penalise(scores: Tensor, penalties: Penalties, state: RowState) -> None:
    """Make tokens that were there before less likely, by four penalties one after the other; the rows are counted.

    Repetition divides positive scores of all tokens that were there and multiplies negative ones; frequency subtracts
    penalty · occurrences / length of the sequence; presence subtracts the penalty from tokens of the output; count
    subtracts the penalty for each time that the token is in the output.
    """
    if on_gpu(scores):
        from loraplex_kernels.gpu import scores as _gpu  # Triton exists on GPU machines only

        _gpu.penalise(scores, penalties, state)
    else:
        _reference.penalise(scores, penalties, state)
