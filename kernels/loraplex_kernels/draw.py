"""Drawing tokens: for GPUs."""

from torch import Tensor

from loraplex_kernels.dispatch import on_gpu
from loraplex_kernels.reference import draw as _reference
from loraplex_kernels.row_state import Chosen, RowState
from loraplex_kernels.sampling_inputs import Draws


def temper(scores: Tensor, draws: Draws, chosen: Chosen, logsums: Tensor) -> None:
    """Choose the best token of each row, and temper the rows that draw: (score - best score) / temperature, in place.

    scores: [places, vocab] float32, dense; chosen, logsums: [places]. For a row that does not draw the choice is final;
    `logsums`, float32, is then what turns its scores into log-probabilities; 0 for a row without a token.
    """
    if on_gpu(scores):
        from loraplex_kernels.gpu import draw as _gpu  # Triton exists on GPU machines only

        _gpu.temper(scores, draws, chosen, logsums)
    else:
        _reference.temper(scores, draws, chosen, logsums)


def draw(scores: Tensor, draws: Draws, state: RowState, chosen: Chosen, logsums: Tensor) -> None:
    """Draw a token for each row that draws, from tempered scores, and advance all rows by their tokens.

    argmax(exp(score) / noise) is a draw (the Gumbel-max trick, without its logarithms); the noise is exponential, a
    hash of the row's key, its number of output tokens and the token id, bit for bit that of `engine/noise.py` up to
    the logarithm's rounding. A row without a token, as `temper` has left it in `chosen`, stays as it was.
    """
    if on_gpu(scores):
        from loraplex_kernels.gpu import draw as _gpu  # Triton exists on GPU machines only

        _gpu.draw(scores, draws, state, chosen, logsums)
    else:
        _reference.draw(scores, draws, state, chosen, logsums)
