"""The sampling parameters of a batch's rows, gathered for operations over the whole batch."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from loraplex_server.messages import SamplingParams

LOWEST_TEMPERATURE = 1e-30  # a smaller one may be 0 in float32; at this one only ties with the best are left


@dataclass(frozen=True, slots=True)
class Penalties:
    """The penalised rows of a batch; tensors have one value for each."""

    index: Tensor  # into the batch
    rows: NDArray[np.int64]
    prompt_lengths: Tensor
    repetition: Tensor
    frequency: Tensor
    presence: Tensor
    count: Tensor | None  # absent where all are 0


@dataclass(frozen=True, slots=True)
class Bias:
    """What is added to single scores of a batch; one value each."""

    positions: Tensor  # into the batch
    token_ids: Tensor
    values: Tensor


@dataclass(frozen=True, slots=True)
class Cut:
    """One cut and the sampled rows that ask for it; no index where all do."""

    index: Tensor | None  # into the sampled rows
    keep: Callable[[Tensor], None]


@dataclass(frozen=True, slots=True)
class Draws:
    """The rows of a batch that sample instead of taking the best token."""

    index: Tensor  # into the batch
    rows: NDArray[np.int64]
    keys: NDArray[np.uint64]
    temperature: Tensor  # [sampled, 1]
    cuts: list[Cut]


@dataclass(frozen=True, slots=True)
class Batch:
    """The parameters of a set of rows, gathered once and used for as long as the same rows come."""

    rows: list[int]
    row_index: NDArray[np.int64]
    watermarked: list[int]  # positions in the batch
    penalties: Penalties | None
    bias: Bias | None
    draws: Draws | None
    remembered: list[int]  # positions of the rows whose tokens are kept for penalties or watermark
    guided: list[int]  # positions of the rows with a grammar
    banning: list[int]  # positions of the rows with tokens that they may not choose
    top_counts: dict[int, int]  # position → number of likely tokens to report

    @property
    def is_plain(self) -> bool:
        """Whether every row takes its best token as the scores come, and reports no others."""
        return not (self.changes_scores or self.top_counts)

    @property
    def changes_scores(self) -> bool:
        """Whether anything beside greedy rows as they come is in the batch."""
        return bool(self.watermarked or self.penalties or self.bias or self.draws)


def has_penalty(params: SamplingParams) -> bool:
    """Whether a sequence has any."""
    return (
        params.repetition_penalty != 1
        or params.frequency_penalty != 0
        or params.presence_penalty != 0
        or params.count_penalty != 0
    )
