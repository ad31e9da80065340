"""What sampled rows ask for, as tensors on a GPU. A place is a sampled row's line in the scores."""

from dataclasses import dataclass

from torch import Tensor

# Flags of a sampled row: what it does beside taking its best token.
DRAWS = 1
IS_COUNTED = 2
IS_REMEMBERED = 4


@dataclass(frozen=True, slots=True)
class Masks:
    """Sets of tokens and the places that they are for."""

    words: Tensor  # [masks, words] int32: bit i of a line stands for token i, the lowest bit of a word first
    of_place: Tensor  # int32: the line for each place, -1 for none


@dataclass(frozen=True, slots=True)
class Biases:
    """What is added to single scores; a token comes at most once a place."""

    places: Tensor  # [N] int32
    token_ids: Tensor  # [N] int32
    values: Tensor  # [N] float32


@dataclass(frozen=True, slots=True)
class Bans:
    """Tokens that are not chosen before the output has `until` tokens, and only where it ends with a run of tokens."""

    places: Tensor  # [N] int32, as all of them
    rows: Tensor
    token_ids: Tensor
    until: Tensor
    starts: Tensor  # of the run in `runs`
    lengths: Tensor
    runs: Tensor
    longest: int  # of `lengths`


@dataclass(frozen=True, slots=True)
class Penalties:
    """The penalised places; one value for each."""

    places: Tensor  # [N] int32
    rows: Tensor  # [N] int32
    repetition: Tensor  # [N] float32, as the others
    frequency: Tensor
    presence: Tensor
    count: Tensor


@dataclass(frozen=True, slots=True)
class Cuts:
    """The places whose scores are cut before the draw; one value for each."""

    places: Tensor  # int32
    top_k: Tensor  # int32, at least 1; the size of the vocabulary for off
    top_p: Tensor  # float32, 1 for off
    least: Tensor  # float32: lower scores are cut; -inf for off. For a min_p, its logarithm where the best score is 0
    typical_p: Tensor  # float32, 1 for off


@dataclass(frozen=True, slots=True)
class Draws:
    """How the rows of some scores choose; one value a place, which is a line of the scores."""

    rows: Tensor  # int32
    flags: Tensor  # int32, as above
    temperature: Tensor  # float32, above 0; not read where a row takes its best token
    keys: Tensor  # int64: the bits of the seed's key
