"""The tensors of one step, as the model sees them."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class AttentionBatch:
    """Where each sequence's queries stand in the batch and where its keys and values lie in the cache.

    T tokens of B sequences. The first `num_decodes` sequences have exactly one query each; the others (chunks of
    prompts) have one or more. `seq_lens` counts a sequence's tokens with those of this step, so sequence b's
    queries are its positions seq_lens[b] - query_len[b] … seq_lens[b] - 1.
    """

    query_start: Tensor  # [B + 1] int32, ascending from 0 to T
    seq_lens: Tensor  # [B] int32
    block_table: Tensor  # [B, ceil(max_seq_len / block_size)] int32: KV blocks in order; cells beyond a sequence: 0
    slot_mapping: Tensor  # [T] int64: the KV cell that each token writes, block * block_size + offset
    num_decodes: int
    max_query_len: int
    max_seq_len: int


@dataclass(frozen=True, slots=True)
class LoraDelta:
    """The stacked weights of a tile's adapters for one linear: R rank rows in all. See loraplex_kernels.lora."""

    a: Tensor  # [R, in], packed
    b: Tensor  # [R, out], packed
    foreign: Tensor | None  # [tile's tokens, R] bool: the rank row is not of the token's adapter; None: all rows are


@dataclass(frozen=True, slots=True)
class LoraTile:
    """A run of tokens whose adapters are computed together."""

    start: int
    end: int
    deltas: tuple[LoraDelta | None, ...]  # by the linear's index; None where no adapter of the tile touches it


@dataclass(frozen=True, slots=True)
class LoraBatch:
    """Which adapter each token has. Tokens of one adapter that stand together are a segment."""

    token_slots: Tensor  # [T] int32: adapter slot, -1 for none
    segment_start: tuple[int, ...]  # N + 1 values, ascending from 0 to T
    segment_slots: tuple[int, ...]  # N values; -1 for tokens without an adapter
    max_rank: int
    tiles: tuple[LoraTile, ...]  # ascending, without overlap; tokens in no tile have no adapter


@dataclass(frozen=True, slots=True)
class ForwardBatch:
    """One step's input: T tokens, of which S rows give logits."""

    token_ids: Tensor  # [T] int64
    positions: Tensor  # [T] int64
    sample_rows: Tensor  # [S] int64: rows of T whose logits are wanted
    attention: AttentionBatch
    lora: LoraBatch | None  # absent when no token has an adapter
