"""Attention by kernels that read the blocks themselves: nothing is grouped or padded, nothing asked of the device."""

from dataclasses import dataclass

import torch
from torch import Tensor

from loraplex_kernels.attention import chunk_attention, decode_attention
from loraplex_kernels.flashinfer_prompts import PlannedPrompts
from loraplex_models.forward import AttentionBatch

NO_WINDOW = 1 << 30


@dataclass(frozen=True, slots=True)
class BlockPlan:
    """A step's sequences as they are in the batch."""

    batch: AttentionBatch
    block_size: int
    window: int  # keys that a query sees, its own included
    counters: Tensor | None  # from split_counters
    prompts: PlannedPrompts | None = None  # what lets chunks attend in place of our kernel

    @property
    def has_decodes_only(self) -> bool:
        """Whether each row is a sequence's newest token."""
        return self.batch.num_decodes == len(self.batch.seq_lens)


def attend_blocks(
    queries: Tensor, cache: Tensor, plan: BlockPlan, num_kv_heads: int, scale: float, cap: float | None
) -> Tensor:
    """Return what each token's heads gather, [T, num_heads * head_dim]; queries: [T, num_heads * head_dim]."""
    batch, count = plan.batch, plan.batch.num_decodes
    out = None
    if plan.prompts is not None:
        out = torch.empty_like(queries, memory_format=torch.contiguous_format)
        plan.prompts.run(queries[count:], cache, out[count:])
    elif count < len(batch.seq_lens):
        out = chunk_attention(
            queries, cache, batch.block_table[count:], batch.query_start[count:], batch.seq_lens[count:],
            max_query_len=batch.max_query_len, block_size=plan.block_size, num_kv_heads=num_kv_heads, scale=scale,
            window=plan.window, cap=cap,
        )  # fmt: skip
    if out is not None and count == 0:
        return out
    decoded = decode_attention(
        queries[:count], cache, batch.block_table[:count], batch.seq_lens[:count],
        block_size=plan.block_size, num_kv_heads=num_kv_heads, scale=scale, window=plan.window, cap=cap,
        counters=plan.counters, out=None if out is None else out[:count],
    )  # fmt: skip
    return decoded if out is None else out
