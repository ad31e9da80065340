"""Batches for a GPU: as they are, by one copy; or steps filled up to a fixed size, in tensors that stay in place."""

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from loraplex_kernels.flashinfer_prompts import HostChunks
from loraplex_kernels.lora import LoraSegments
from loraplex_kernels.lora_pages import DECODE_TILE_ROWS, PREFILL_TILE_ROWS, LinearPages, RowTiles, cut_tiles
from loraplex_models.adapters.paged_slots import PagedAdapterSlots
from loraplex_models.adapters.slots import NO_SLOT
from loraplex_models.forward import AttentionBatch, ForwardBatch, LoraBatch
from loraplex_models.layers.block_attention import NO_WINDOW
from loraplex_server.engine.batch_builder import BatchBuilder, StepArrays, put_chosen_tokens
from loraplex_server.engine.staging import StagedInputs, send_arrays
from loraplex_server.engine.step import ScheduledSequence, StepPlan

NO_SEGMENTS = LoraSegments((0,), ())
Segments = tuple[tuple[int, ...], tuple[int, ...]]  # borders of runs of rows, and the slot of each


@dataclass(frozen=True, slots=True)
class StepSize:
    """The room of a step that is captured; without chunks it has decodes only."""

    num_decodes: int
    num_chunks: int = 0
    num_tokens: int = 0  # of all chunks

    def takes(self, num_decodes: int, num_chunks: int, num_tokens: int) -> bool:
        """Whether a step with so many fits."""
        return num_decodes <= self.num_decodes and num_chunks <= self.num_chunks and num_tokens <= self.num_tokens


class DeviceBatchBuilder(BatchBuilder):
    """As BatchBuilder; all of a step's numbers, those of its LoRA tiles among them, travel in one copy."""

    def __init__(
        self, num_rows: int, max_blocks: int, block_size: int, slots: PagedAdapterSlots, device: torch.device
    ) -> None:
        super().__init__(num_rows, max_blocks, block_size, slots, device)
        self._paged_slots = slots

    def batch(self, plan: StepPlan, arrays: StepArrays, last_token_ids: Tensor | None = None) -> ForwardBatch:
        """The step's tensors, from its numbers."""
        tile_rows = DECODE_TILE_ROWS if arrays.max_query_len == 1 else PREFILL_TILE_ROWS
        tiles = np.array(cut_tiles(*arrays.segments, tile_rows), np.int32).reshape(3, -1)
        count = np.array([tiles.shape[1]], np.int32)
        sent = send_arrays(
            [
                arrays.token_ids, arrays.positions, arrays.sample_rows, arrays.query_start, arrays.seq_lens,
                arrays.block_table, arrays.slot_mapping, tiles, count, _row_slots(arrays),
                *([arrays.token_rows] if arrays.token_rows is not None else []),
            ],
            self._device,
        )  # fmt: skip
        token_ids, positions, sample_rows, query_start, seq_lens, block_table, slot_mapping = sent[:7]
        on_device, num_tiles, row_slots = sent[7:10]
        if arrays.token_rows is not None:
            put_chosen_tokens(token_ids, sent[10], last_token_ids)
        row_tiles = RowTiles(on_device[0], on_device[1], on_device[2], num_tiles, row_slots, tile_rows)
        return ForwardBatch(
            token_ids=token_ids,
            positions=positions,
            sample_rows=sample_rows,
            attention=AttentionBatch(
                query_start=query_start,
                seq_lens=seq_lens,
                block_table=block_table,
                slot_mapping=slot_mapping,
                num_decodes=plan.num_decodes,
                max_query_len=arrays.max_query_len,
                max_seq_len=arrays.max_seq_len,
                chunks=_host_chunks(arrays, plan.num_decodes),
            ),
            lora=self._paged_slots.route_tiles(*arrays.segments, row_tiles),
        )

    def widest_batch(self, num_tokens: int) -> ForwardBatch:
        """One prompt of that many tokens that takes the room of adapters on every linear: to measure memory with."""
        blocks = list(range(-(-num_tokens // self._block_size)))
        sequence = ScheduledSequence(
            row=0, token_ids=[0] * num_tokens, start=0, new_block_ids=blocks, slot=NO_SLOT, samples=True
        )
        plan = StepPlan(step_id=0, sequences=[sequence])
        self.start_row(0)
        batch = self.build(plan)
        none = torch.zeros(1, dtype=torch.int32, device=self._device)
        rows = torch.full((num_tokens,), NO_SLOT, dtype=torch.int32, device=self._device)
        tiles = RowTiles(none, none, none, none, rows, PREFILL_TILE_ROWS)
        return replace(batch, lora=LoraBatch(NO_SEGMENTS, (), tiles=tiles, pages=self._paged_slots.pages))


class FixedStep:
    """Decodes beside chunks of prompts: so many rows for the ones, so many chunks of so many tokens together at most.

    Rows without a sequence have no keys, so that attention gives zeros, and write to a cell that nobody reads: behind
    the decodes each is a sequence, behind the chunks all are one. `batch` never changes: it names the tensors that
    `fill` brings numbers into. Whatever adapters the rows have is in those numbers, so what was captured over it stays
    valid.
    """

    def __init__(
        self,
        size: StepSize,
        max_blocks: int,
        spare_cell: int,
        pages: tuple[LinearPages | None, ...],
        device: torch.device,
    ) -> None:
        """`pages`: those of the linears, None where none are read; empty for steps of the base alone."""
        self.size = size
        self._spare_cell = spare_cell
        num_rows = size.num_decodes + size.num_tokens
        num_sequences = size.num_decodes + (size.num_chunks + 1 if size.num_tokens else 0)
        self._tile_rows = PREFILL_TILE_ROWS if size.num_tokens else DECODE_TILE_ROWS
        # A chunk may begin with tokens of the base: it has two runs of rows then.
        most_tiles = size.num_decodes + 2 * size.num_chunks + size.num_tokens // self._tile_rows
        long, short = np.int64, np.int32
        self._inputs = StagedInputs(
            [
                ((num_rows,), long), ((num_rows,), long), ((num_rows,), long), ((num_rows,), long),
                ((size.num_decodes + size.num_chunks,), long), ((num_sequences + 1,), short), ((num_sequences,), short),
                ((num_sequences, max_blocks), short), ((3, most_tiles), short), ((1,), short), ((num_rows,), short),
            ],
            device,
        )  # fmt: skip
        (
            token_ids, positions, slot_mapping, self._token_rows, sample_rows, query_start, seq_lens, block_table,
            tiles, num_tiles, row_slots,
        ) = self._inputs.tensors  # fmt: skip
        rows = RowTiles(tiles[0], tiles[1], tiles[2], num_tiles, row_slots, self._tile_rows)
        self.batch = ForwardBatch(
            token_ids=token_ids,
            positions=positions,
            sample_rows=sample_rows,
            attention=AttentionBatch(
                query_start=query_start,
                seq_lens=seq_lens,
                block_table=block_table,
                slot_mapping=slot_mapping,
                num_decodes=size.num_decodes,
                max_query_len=max(1, size.num_tokens),
                max_seq_len=NO_WINDOW,
            ),
            lora=LoraBatch(NO_SEGMENTS, (None,) * len(pages), tiles=rows, pages=pages) if pages else None,
        )
        self.fill(None, 0)

    def fill(self, arrays: StepArrays | None, num_decodes: int, last_token_ids: Tensor | None = None) -> None:
        """Bring a step in, of which the first `num_decodes` sequences are decodes; None: no sequence at all.

        last_token_ids: see `BatchBuilder.build`.
        """
        (
            token_ids, positions, slot_mapping, token_rows, sample_rows, query_start, seq_lens, block_table,
            tiles, num_tiles, row_slots,
        ) = self._inputs.write()  # fmt: skip
        room = self.size.num_decodes
        token_ids[:], positions[:], slot_mapping[:], token_rows[:], row_slots[:] = 0, 0, self._spare_cell, 0, NO_SLOT
        sample_rows[:], seq_lens[:], num_tiles[0] = 0, 0, 0
        query_start[:room], query_start[room:-1], query_start[-1] = np.arange(room), room, len(token_ids)
        if arrays is not None:
            decodes, prompts = slice(None, num_decodes), slice(num_decodes, None)
            numbers: list[tuple[NDArray[Any], NDArray[Any]]] = [
                (token_ids, arrays.token_ids), (positions, arrays.positions), (slot_mapping, arrays.slot_mapping),
                (row_slots, _row_slots(arrays)), (seq_lens, arrays.seq_lens),
            ]  # fmt: skip
            if arrays.token_rows is not None:
                numbers.append((token_rows, arrays.token_rows))
            for there, here in numbers:
                there[decodes], there[room : room + len(here) - num_decodes] = here[decodes], here[prompts]
            # Beyond a sequence's own blocks nothing is read, so old numbers may stand there.
            num_chunks, width = len(arrays.seq_lens) - num_decodes, arrays.block_table.shape[1]
            block_table[decodes, :width] = arrays.block_table[decodes]
            block_table[room : room + num_chunks, :width] = arrays.block_table[prompts]
            gap = room - num_decodes
            starts = arrays.query_start[prompts] + gap
            if self.size.num_tokens:
                query_start[room : room + num_chunks + 1], query_start[room + num_chunks + 1 : -1] = starts, starts[-1]
            rows = arrays.sample_rows
            sample_rows[: len(rows)] = np.where(rows < num_decodes, rows, rows + gap)
            cut = cut_tiles(*_opened(arrays.segments, num_decodes, gap), self._tile_rows)
            num_tiles[0] = len(cut[0])
            tiles[:, : len(cut[0])] = cut
        self._inputs.send()
        if arrays is not None and arrays.token_rows is not None:
            put_chosen_tokens(self.batch.token_ids, self._token_rows, last_token_ids)


def _host_chunks(arrays: StepArrays, num_decodes: int) -> HostChunks | None:
    if num_decodes == len(arrays.seq_lens):
        return None
    return HostChunks(arrays.query_start[num_decodes:], arrays.seq_lens[num_decodes:], arrays.block_table[num_decodes:])


def _opened(segments: Segments, row: int, gap: int) -> Segments:
    """Runs of rows of one adapter, with so many rows of none put in before a row."""
    borders, slots = [0], list[int]()
    for (start, end), slot in zip(pairwise(segments[0]), segments[1], strict=True):
        if start < row:
            borders.append(min(end, row))
            slots.append(slot)
        if end > row:
            if start <= row:
                borders.append(row + gap)
                slots.append(NO_SLOT)
            borders.append(end + gap)
            slots.append(slot)
    return tuple(borders), tuple(slots)


def _row_slots(arrays: StepArrays) -> NDArray[np.int32]:
    starts, slots = arrays.segments
    return np.repeat(np.array(slots, np.int32), np.diff(starts))
