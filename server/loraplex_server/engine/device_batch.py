"""Batches for a GPU: as they are, by one copy; or decodes filled up to a fixed size, in tensors that stay in place."""

from dataclasses import replace

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


class FixedDecodes:
    """Decodes of up to `size` sequences. Rows without a sequence have no keys, and write to a cell that nobody reads.

    `batch` never changes: it names the tensors that `fill` brings numbers into. Whatever adapters the rows have is in
    those numbers, so what was captured over it stays valid.
    """

    def __init__(
        self, size: int, max_blocks: int, spare_cell: int, pages: tuple[LinearPages | None, ...], device: torch.device
    ) -> None:
        """`pages`: those of the linears, None where none are read; empty for decodes of the base alone."""
        self.size = size
        self._spare_cell = spare_cell
        long, short = np.int64, np.int32
        self._inputs = StagedInputs(
            [
                ((size,), long), ((size,), long), ((size,), long), ((size,), short), ((size, max_blocks), short),
                ((3, size), short), ((1,), short), ((size,), short), ((size,), long),
            ],
            device,
        )  # fmt: skip
        token_ids, positions, slot_mapping, seq_lens, block_table, tiles, num_tiles, row_slots, token_rows = (
            self._inputs.tensors
        )
        self._token_rows = token_rows
        rows = RowTiles(tiles[0], tiles[1], tiles[2], num_tiles, row_slots, DECODE_TILE_ROWS)
        self.batch = ForwardBatch(
            token_ids=token_ids,
            positions=positions,
            sample_rows=torch.arange(size, device=device),
            attention=AttentionBatch(
                query_start=torch.arange(size + 1, dtype=torch.int32, device=device),
                seq_lens=seq_lens,
                block_table=block_table,
                slot_mapping=slot_mapping,
                num_decodes=size,
                max_query_len=1,
                max_seq_len=NO_WINDOW,
            ),
            lora=LoraBatch(NO_SEGMENTS, (None,) * len(pages), tiles=rows, pages=pages) if pages else None,
        )
        self.fill(None)

    def fill(self, arrays: StepArrays | None, last_token_ids: Tensor | None = None) -> None:
        """Bring a step's decodes in; None: no sequence at all. See `BatchBuilder.build`."""
        token_ids, positions, slot_mapping, seq_lens, block_table, tiles, num_tiles, row_slots, token_rows = (
            self._inputs.write()
        )
        count = 0 if arrays is None else len(arrays.seq_lens)
        token_ids[count:], positions[count:], seq_lens[count:], row_slots[count:] = 0, 0, 0, NO_SLOT
        slot_mapping[count:] = self._spare_cell
        num_tiles[0] = 0
        if arrays is not None:
            token_ids[:count], positions[:count], slot_mapping[:count] = (
                arrays.token_ids, arrays.positions, arrays.slot_mapping,
            )  # fmt: skip
            seq_lens[:count], row_slots[:count] = arrays.seq_lens, _row_slots(arrays)
            # Beyond a sequence's own blocks nothing is read, so old numbers may stand there.
            block_table[:count, : arrays.block_table.shape[1]] = arrays.block_table
            cut = np.array(cut_tiles(*arrays.segments, DECODE_TILE_ROWS), np.int32).reshape(3, -1)
            tiles[:, : cut.shape[1]] = cut
            num_tiles[0] = cut.shape[1]
        chosen = None if arrays is None else arrays.token_rows
        token_rows[:] = 0
        if chosen is not None:
            token_rows[:count] = chosen
        self._inputs.send()
        if chosen is not None:
            put_chosen_tokens(self.batch.token_ids, self._token_rows, last_token_ids)


def _host_chunks(arrays: StepArrays, num_decodes: int) -> HostChunks | None:
    if num_decodes == len(arrays.seq_lens):
        return None
    return HostChunks(arrays.query_start[num_decodes:], arrays.seq_lens[num_decodes:], arrays.block_table[num_decodes:])


def _row_slots(arrays: StepArrays) -> NDArray[np.int32]:
    starts, slots = arrays.segments
    return np.repeat(np.array(slots, np.int32), np.diff(starts))
