"""What a GPU knows of the sequences in the rows of a batch, so that a step can follow another without the host."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class RowState:
    """One line a row; kernels advance it by the tokens that they choose. All but `last_token_ids` are int32."""

    last_token_ids: Tensor  # [rows] int64
    num_tokens: Tensor  # [rows], prompt and output
    num_prompt: Tensor  # [rows]
    counts: (
        Tensor  # [rows, 2, vocab]: how often each token is in the prompt, and in the output; of rows with IS_COUNTED
    )
    outputs: Tensor  # [rows, capacity]: the tokens of the output; of rows with IS_REMEMBERED


@dataclass(frozen=True, slots=True)
class Chosen:
    """Where kernels write what they chose: one entry a row."""

    token_ids: Tensor  # int64, -1 for a row with a NaN, with +inf, or with nothing but -inf
    logprobs: Tensor  # float32, 0 for such a row


@dataclass(frozen=True, slots=True)
class Tops:
    """Where kernels write the likeliest tokens of some rows, in no order: as many of each line as were found."""

    num_found: Tensor  # [N] int32
    token_ids: Tensor  # [N, most] int32
    logprobs: Tensor  # [N, most] float32
