"""Attention over the paged cache: how a step's sequences are grouped, once, and what each layer then does."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from loraplex_kernels.attention import (
    capped_attention,
    decode_attention,
    is_decode_fast,
    order_cells,
    paged_attention,
    split_counters,
    turn_and_decode,
)
from loraplex_kernels.dispatch import has_gpu_forms
from loraplex_kernels.flashinfer_prompts import PromptAttention
from loraplex_kernels.kv_cache import HeadNorms, rotate_and_store
from loraplex_kernels.lora_pages import RowDelta
from loraplex_models.forward import AttentionBatch
from loraplex_models.layers.block_attention import NO_WINDOW, BlockPlan, attend_blocks

# Sequences are computed together, padded to the longest, until the padding costs about as much as a group of its own:
# some 50 us a layer, the time of a thousand keys or of sixteen thousand scores.
MAX_WASTED_KEYS = 1024
MAX_WASTED_SCORES = 16384


class KVCache:
    """The keys and values of all blocks, one tensor [num_blocks * block_size, 2 * num_kv_heads * head_dim] a layer."""

    def __init__(
        self,
        *,
        num_layers: int,
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.num_kv_heads = num_kv_heads
        self.dtype = dtype
        shape = (num_layers, num_blocks * block_size, 2 * num_kv_heads * head_dim)
        cells = _zeros(shape, dtype, device)
        self.layers: tuple[Tensor, ...] = cells.unbind(0)
        self.num_bytes = cells.nbytes
        self.split_counters = split_counters(device)  # for all layers: they attend one after the other


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    # numpy's zeros are pages that the system hands out at the first touch; torch's would be written here and now.
    return torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, dtype=np.uint8)).view(dtype).view(shape)


@dataclass(frozen=True, slots=True)
class AttentionGroup:
    """P sequences that are computed together, padded to N queries and K keys. Padding repeats a sequence's own cells,
    so that nothing of another sequence is ever read.
    """

    num_sequences: int
    num_queries: int
    num_keys: int
    cells: Tensor | None  # from order_cells; None when P is 1 and the keys lie one after the other
    first_cell: int  # where they start then; else -1
    mask: Tensor | None  # [P, N, K]: 0 or -inf; None when all queries see all keys
    first_token: int  # where the group's tokens start, when they stand together without padding; else -1
    tokens: Tensor | None  # [P * N] the token of each query, padding included; None when they stand together
    padded_rows: Tensor | None  # [tokens of the group] their places among P * N
    group_tokens: Tensor | None  # [tokens of the group] their places in the batch


@dataclass(frozen=True, slots=True)
class DecodeGroup:
    """The step's first sequences, one query each, attending straight from their blocks."""

    num_sequences: int
    block_table: Tensor  # [P, max_blocks] int32
    seq_lens: Tensor  # [P] int32
    block_size: int
    window: int  # keys that a query sees, its own included


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """One step's groups, and the cell that each token writes. Shared by all layers."""

    decodes: DecodeGroup | None
    groups: tuple[AttentionGroup, ...]
    slot_mapping: Tensor
    blocks: BlockPlan | None = None  # on a GPU: in place of all groups


@dataclass(frozen=True, slots=True)
class _Sequence:
    index: int
    first_token: int
    num_queries: int
    num_keys: int


def plan_attention(
    batch: AttentionBatch,
    cache: KVCache,
    window: int | None,
    *,
    groups_decodes: bool = False,
    prompts: PromptAttention | None = None,
) -> AttentionPlan:
    """Group the step's sequences over a cache. With `window` a query sees that many keys, its own included.

    `groups_decodes`: decodes are computed in groups like chunks, never straight from their blocks. `prompts`: on a GPU
    lets chunks attend in place of our kernel.
    """
    if has_gpu_forms(batch.seq_lens.device):
        planned = None
        if prompts is not None and batch.chunks is not None:
            planned = prompts.plan(batch.chunks, cache.block_size, window)
        blocks = BlockPlan(batch, cache.block_size, window or NO_WINDOW, cache.split_counters, planned)
        return AttentionPlan(None, (), batch.slot_mapping, blocks)
    lengths = batch.seq_lens.tolist()
    if window is not None and window >= batch.max_seq_len:
        window = None
    count = batch.num_decodes
    decodes = None
    if count and not groups_decodes and is_decode_fast(sum(lengths[:count]), cache.dtype, batch.seq_lens.device):
        decodes = DecodeGroup(
            num_sequences=count,
            block_table=batch.block_table[:count],
            seq_lens=batch.seq_lens[:count],
            block_size=cache.block_size,
            window=window or batch.max_seq_len,
        )
        if count == len(lengths):
            return AttentionPlan(decodes, (), batch.slot_mapping)
    starts = batch.query_start.tolist()
    sequences = [
        _Sequence(index, starts[index], starts[index + 1] - starts[index], num_keys)
        for index, num_keys in enumerate(lengths)
    ]
    parts = ([] if decodes else sequences[:count], sequences[count:])
    block_table = batch.block_table.long()
    groups = tuple(_make_group(group, block_table, cache, window) for part in parts for group in _split(part))
    return AttentionPlan(decodes, groups, batch.slot_mapping)


def _split(sequences: list[_Sequence]) -> list[list[_Sequence]]:
    if _is_economical(sequences):
        return [sequences] if sequences else []
    groups: list[list[_Sequence]] = []
    for sequence in sorted(sequences, key=lambda s: (s.num_queries * s.num_keys, s.num_keys), reverse=True):
        if groups and _is_economical([*groups[-1], sequence]):
            groups[-1].append(sequence)
        else:
            groups.append([sequence])
    return groups


def _is_economical(sequences: Sequence[_Sequence]) -> bool:
    if len(sequences) < 2:
        return True
    num_queries = max(s.num_queries for s in sequences)
    num_keys = max(s.num_keys for s in sequences)
    wasted_keys = sum(num_keys - s.num_keys for s in sequences)
    wasted_scores = sum(num_queries * num_keys - s.num_queries * s.num_keys for s in sequences)
    return wasted_keys <= MAX_WASTED_KEYS and wasted_scores <= MAX_WASTED_SCORES


def _make_group(sequences: list[_Sequence], block_table: Tensor, cache: KVCache, window: int | None) -> AttentionGroup:
    num_queries = max(s.num_queries for s in sequences)
    num_keys = max(s.num_keys for s in sequences)
    is_level = all(s.num_queries == num_queries for s in sequences)
    first_token = sequences[0].first_token
    if is_level and all(s.first_token == first_token + i * num_queries for i, s in enumerate(sequences)):
        tokens = padded_rows = group_tokens = None
    else:
        first_token = -1
        tokens, padded_rows, group_tokens = _padded_tokens(sequences, num_queries, block_table.device)
    lengths = torch.tensor([[s.num_keys] for s in sequences], device=block_table.device)
    cells = _cells(sequences, lengths, num_keys, block_table, cache.block_size)
    ordered = order_cells(cells, num_queries, cache.num_kv_heads, cache.dtype)
    is_one_run = ordered is cells and len(sequences) == 1 and bool((cells.diff() == 1).all())
    return AttentionGroup(
        num_sequences=len(sequences),
        num_queries=num_queries,
        num_keys=num_keys,
        cells=None if is_one_run else ordered,
        first_cell=int(cells[0, 0]) if is_one_run else -1,
        mask=_mask(sequences, lengths, num_queries, num_keys, cache.dtype, window),
        first_token=first_token,
        tokens=tokens,
        padded_rows=padded_rows,
        group_tokens=group_tokens,
    )


def _padded_tokens(sequences: list[_Sequence], num_queries: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    steps = torch.arange(num_queries, device=device)
    firsts = torch.tensor([[s.first_token] for s in sequences], device=device)
    counts = torch.tensor([[s.num_queries] for s in sequences], device=device)
    tokens = (firsts + steps.minimum(counts - 1)).view(-1)
    padded_rows = (steps < counts).view(-1).nonzero().view(-1)
    return tokens, padded_rows, tokens.index_select(0, padded_rows)


def _cells(sequences: list[_Sequence], lengths: Tensor, num_keys: int, block_table: Tensor, block_size: int) -> Tensor:
    keys = torch.arange(num_keys, device=block_table.device).minimum(lengths - 1)
    if len(sequences) != len(block_table):
        block_table = block_table[[s.index for s in sequences]]
    return block_table.gather(1, keys // block_size).mul_(block_size).add_(keys % block_size)


def _mask(
    sequences: list[_Sequence], lengths: Tensor, num_queries: int, num_keys: int, dtype: torch.dtype, window: int | None
) -> Tensor | None:
    if num_queries == 1 and window is None and all(s.num_keys == num_keys for s in sequences):
        return None
    device = lengths.device
    counts = torch.tensor([[s.num_queries] for s in sequences], device=device)
    positions = (lengths - counts + torch.arange(num_queries, device=device)).unsqueeze(2)
    keys = torch.arange(num_keys, device=device)
    hidden = keys > positions
    if window is not None:
        hidden |= keys <= positions - window
    return torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(hidden, float("-inf"))


class Attention:
    """Turns queries and keys, stores keys and values, attends. Shared by all layers, as it has no weights."""

    _cap: float | None = None
    _turns_neighbours = False  # elements 2 i and 2 i + 1 of a head together, on a GPU

    def __init__(self, num_heads: int, num_kv_heads: int, head_dim: int, scale: float | None = None) -> None:
        """Attend with that scale of the scores; by default head_dim ** -0.5."""
        self._num_heads = num_heads
        self._query_width = num_heads * head_dim
        self._num_kv_heads = num_kv_heads
        self._head_dim = head_dim
        self._scale = head_dim**-0.5 if scale is None else scale

    def forward(
        self,
        qkv: Tensor,
        cache: Tensor,
        plan: AttentionPlan,
        cos: Tensor,
        signed_sin: Tensor,
        delta: RowDelta | None = None,
        norms: HeadNorms | None = None,
    ) -> Tensor:
        """Return what each token's heads gather, [T, num_heads * head_dim].

        qkv: [T, queries | keys | values], its queries and keys may be turned in place, after `delta` was added and they
        were normalised; cache: one layer of a KVCache, written in place.
        """
        blocks = plan.blocks
        are_neighbours = self._turns_neighbours and blocks is not None
        if blocks is not None and blocks.has_decodes_only and (norms is None or norms.squares is None):
            return turn_and_decode(
                qkv, cos, signed_sin, cache, plan.slot_mapping, blocks.batch.block_table, blocks.batch.seq_lens,
                num_heads=self._num_heads, head_dim=self._head_dim, block_size=blocks.block_size,
                num_kv_heads=self._num_kv_heads, scale=self._scale, window=blocks.window, cap=self._cap, delta=delta,
                norms=norms, counters=blocks.counters, are_neighbours=are_neighbours,
            )  # fmt: skip
        rotate_and_store(
            qkv, cos, signed_sin, cache, plan.slot_mapping, self._num_heads, self._head_dim, delta, norms,
            are_neighbours=are_neighbours,
        )  # fmt: skip
        queries = qkv.narrow(1, 0, self._query_width)
        if blocks is not None:
            return attend_blocks(queries, cache, blocks, self._num_kv_heads, self._scale, self._cap)
        if plan.decodes is not None and not plan.groups:
            return self._decode(queries, cache, plan.decodes)
        if plan.decodes is None and len(plan.groups) == 1 and plan.groups[0].tokens is None:
            return self._attend(queries, cache, plan.groups[0])
        out = torch.empty_like(queries, memory_format=torch.contiguous_format)
        if plan.decodes is not None:
            count = plan.decodes.num_sequences
            out.narrow(0, 0, count).copy_(self._decode(queries.narrow(0, 0, count), cache, plan.decodes))
        for group in plan.groups:
            if group.tokens is None:
                num_tokens = group.num_sequences * group.num_queries
                found = self._attend(queries.narrow(0, group.first_token, num_tokens), cache, group)
                out.narrow(0, group.first_token, num_tokens).copy_(found)
            else:
                assert group.padded_rows is not None and group.group_tokens is not None
                found = self._attend(queries.index_select(0, group.tokens), cache, group)
                out.index_copy_(0, group.group_tokens, found.index_select(0, group.padded_rows))
        return out

    def _decode(self, queries: Tensor, cache: Tensor, group: DecodeGroup) -> Tensor:
        return decode_attention(
            queries,
            cache,
            group.block_table,
            group.seq_lens,
            block_size=group.block_size,
            num_kv_heads=self._num_kv_heads,
            scale=self._scale,
            window=group.window,
        )

    def _attend(self, queries: Tensor, cache: Tensor, group: AttentionGroup) -> Tensor:
        if group.cells is None:
            cache = cache.narrow(0, group.first_cell, group.num_keys)
        queries = queries.view(group.num_sequences, group.num_queries, self._query_width)
        found = paged_attention(queries, cache, group.cells, group.mask, self._num_kv_heads, self._scale)
        return found.view(-1, self._query_width)


class NeighbourAttention(Attention):
    """Attention that turns elements 2 i and 2 i + 1 of a head together, where others turn i and i + head_dim / 2."""

    _turns_neighbours = True

    def __init__(
        self, num_heads: int, num_kv_heads: int, head_dim: int, scale: float | None, device: torch.device
    ) -> None:
        super().__init__(num_heads, num_kv_heads, head_dim, scale)
        # In this order both are the same; scores do not depend on it, and values keep theirs.
        heads = torch.arange((num_heads + 2 * num_kv_heads) * head_dim).view(-1, head_dim)
        num_turned = num_heads + num_kv_heads
        turned = heads[:num_turned].unflatten(1, (-1, 2)).transpose(1, 2)  # type: ignore[no-untyped-call]
        self._order = torch.cat((turned.reshape(-1), heads[num_turned:].reshape(-1))).to(device)

    def forward(
        self,
        qkv: Tensor,
        cache: Tensor,
        plan: AttentionPlan,
        cos: Tensor,
        signed_sin: Tensor,
        delta: RowDelta | None = None,
        norms: HeadNorms | None = None,
    ) -> Tensor:
        """As `Attention.forward`; on a CPU `qkv` stays as it is."""
        if plan.blocks is None:
            qkv = qkv.index_select(1, self._order)
        return super().forward(qkv, cache, plan, cos, signed_sin, delta, norms)


class CappedAttention(Attention):
    """Attention whose scores are bent to stay within a cap; it takes plans whose decodes are in groups."""

    def __init__(self, num_heads: int, num_kv_heads: int, head_dim: int, scale: float | None, cap: float) -> None:
        super().__init__(num_heads, num_kv_heads, head_dim, scale)
        self._cap = cap

    def _attend(self, queries: Tensor, cache: Tensor, group: AttentionGroup) -> Tensor:
        if group.cells is None:
            cache = cache.narrow(0, group.first_cell, group.num_keys)
        queries = queries.view(group.num_sequences, group.num_queries, self._query_width)
        assert self._cap is not None
        found = capped_attention(
            queries, cache, group.cells, group.mask, num_kv_heads=self._num_kv_heads, scale=self._scale, cap=self._cap
        )
        return found.view(-1, self._query_width)
