"""The tensors of one step, as the model sees them."""

from dataclasses import dataclass

from torch import Tensor

from loraplex_kernels.flashinfer_prompts import HostChunks
from loraplex_kernels.lora import LoraSegments, LoraTable
from loraplex_kernels.lora_pages import LinearPages, RowTiles
from loraplex_models.layers.expert_lora import ExpertDeltas
from loraplex_models.layers.lora_extras import EmbeddingExtras, HeadExtras, LinearExtras


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
    chunks: HostChunks | None = None  # on a GPU, where there are some: what the host knows of the chunks


@dataclass(frozen=True, slots=True)
class LoraBatch:
    """Which adapter each token has, and which linears that concerns. Made by `AdapterSlots.route`.

    On a GPU kernels read rank pages, by `tiles` and `pages`, and all tables are None.
    """

    segments: LoraSegments
    tables: tuple[LoraTable | None, ...]  # by the linear's index; None where no adapter of the batch touches it
    # What some adapters bring beside A and B; None where none of the batch does, and then nothing asks further.
    extras: tuple[LinearExtras | None, ...] | None = None  # by the linear's index
    embedding: EmbeddingExtras | None = None
    head: HeadExtras | None = None
    tiles: RowTiles | None = None
    experts: ExpertDeltas | None = None  # absent when no adapter of the batch touches experts
    # By the linear's index, as the tables; then those of experts, where a slot is `slot * experts + expert`.
    pages: tuple[LinearPages | None, ...] = ()


@dataclass(frozen=True, slots=True)
class ForwardBatch:
    """One step's input: T tokens, of which S rows give logits."""

    token_ids: Tensor  # [T] int64
    positions: Tensor  # [T] int64
    sample_rows: Tensor  # [S] int64: rows of T whose logits are wanted
    attention: AttentionBatch
    lora: LoraBatch | None  # absent when no token has an adapter
