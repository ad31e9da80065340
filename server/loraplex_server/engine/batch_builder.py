"""From a StepPlan to the tensors of a ForwardBatch, through tables that are kept per row between steps."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from loraplex_models.adapters.slots import NO_SLOT, AdapterSlots
from loraplex_models.forward import AttentionBatch, ForwardBatch
from loraplex_server.engine.step import ScheduledSequence, StepPlan


@dataclass(frozen=True, slots=True)
class StepArrays:
    """A step's numbers, of the shapes that `ForwardBatch` and `AttentionBatch` name; and its runs of one adapter.

    A negative token is the one that its row, by `token_rows` [T] int64, chose last; no rows where there is none.
    """

    token_ids: NDArray[np.int64]
    positions: NDArray[np.int64]
    sample_rows: NDArray[np.int64]
    query_start: NDArray[np.int32]
    seq_lens: NDArray[np.int32]
    block_table: NDArray[np.int32]
    slot_mapping: NDArray[np.int64]
    max_query_len: int
    max_seq_len: int
    segments: tuple[tuple[int, ...], tuple[int, ...]]
    token_rows: NDArray[np.int64] | None


class BatchBuilder:
    """The block tables of one rank's rows, written by plans only."""

    def __init__(self, num_rows: int, max_blocks: int, block_size: int, slots: AdapterSlots, device: torch.device):
        self._block_table: NDArray[np.int32] = np.zeros((num_rows, max_blocks), np.int32)
        self._num_blocks: NDArray[np.int64] = np.zeros(num_rows, np.int64)
        self._block_size = block_size
        self._slots = slots
        self._device = device

    def start_row(self, row: int) -> None:
        """Empty a row's block table."""
        self._num_blocks[row] = 0

    def build(self, plan: StepPlan, last_token_ids: Tensor | None = None) -> ForwardBatch:
        """The step's tensors. Rows that give logits: each chunk's last token if it samples, all if it has targets.

        last_token_ids: [rows] int64, what each row chose last, for plans with tokens that nobody has read.
        """
        return self.batch(plan, self.arrays(plan), last_token_ids)

    def arrays(self, plan: StepPlan) -> "StepArrays":
        """The step's numbers. Each step's plan must come here once: it grows the block tables."""
        sequences = plan.sequences
        for sequence in sequences:
            self._append_blocks(sequence)
        rows = np.array([s.row for s in sequences], np.int64)
        starts = np.array([s.start for s in sequences], np.int64)
        lengths = np.array([len(s.token_ids) for s in sequences], np.int64)
        query_start = np.zeros(len(sequences) + 1, np.int32)
        np.cumsum(lengths, out=query_start[1:])
        token_ids = np.fromiter((t for s in sequences for t in s.token_ids), np.int64, int(query_start[-1]))
        # Positions run start, start + 1, … within each sequence.
        positions = np.arange(len(token_ids), dtype=np.int64) + np.repeat(starts - query_start[:-1], lengths)
        blocks, offsets = np.divmod(positions, self._block_size)
        token_rows = np.repeat(rows, lengths)
        slot_mapping = self._block_table[token_rows, blocks].astype(np.int64) * self._block_size + offsets
        seq_lens = starts + lengths
        max_seq_len = int(seq_lens.max())
        block_table = self._block_table[rows, : -(-max_seq_len // self._block_size)]
        # Cells beyond a sequence's own blocks may hold what the row had before: name block 0 instead.
        block_table = np.where(np.arange(block_table.shape[1]) < self._num_blocks[rows, None], block_table, 0)
        return StepArrays(
            token_ids=token_ids,
            positions=positions,
            sample_rows=_sample_rows(sequences, query_start),
            query_start=query_start,
            seq_lens=seq_lens.astype(np.int32),
            block_table=block_table,
            slot_mapping=slot_mapping,
            max_query_len=int(lengths.max()),
            max_seq_len=max_seq_len,
            segments=_segments(sequences),
            token_rows=token_rows if token_ids.min() < 0 else None,
        )

    def batch(self, plan: StepPlan, arrays: "StepArrays", last_token_ids: Tensor | None = None) -> ForwardBatch:
        """The step's tensors, from its numbers."""
        token_ids = self._tensor(arrays.token_ids)
        if arrays.token_rows is not None:
            put_chosen_tokens(token_ids, self._tensor(arrays.token_rows), last_token_ids)
        return ForwardBatch(
            token_ids=token_ids,
            positions=self._tensor(arrays.positions),
            sample_rows=self._tensor(arrays.sample_rows),
            attention=AttentionBatch(
                query_start=self._tensor(arrays.query_start),
                seq_lens=self._tensor(arrays.seq_lens),
                block_table=self._tensor(arrays.block_table),
                slot_mapping=self._tensor(arrays.slot_mapping),
                num_decodes=plan.num_decodes,
                max_query_len=arrays.max_query_len,
                max_seq_len=arrays.max_seq_len,
            ),
            lora=self._slots.route(*arrays.segments),
        )

    def _append_blocks(self, sequence: ScheduledSequence) -> None:
        if sequence.new_block_ids:
            start = self._num_blocks[sequence.row]
            end = start + len(sequence.new_block_ids)
            self._block_table[sequence.row, start:end] = sequence.new_block_ids
            self._num_blocks[sequence.row] = end

    def _tensor(self, values: NDArray[np.generic]) -> Tensor:
        return torch.from_numpy(values).to(self._device)


def put_chosen_tokens(token_ids: Tensor, token_rows: Tensor, last_token_ids: Tensor | None) -> None:
    """Put in place of each negative token what its row chose last; nothing waits for the device.

    token_ids, token_rows: [T] int64; last_token_ids: [rows] int64.
    """
    assert last_token_ids is not None, "a plan has tokens that nobody has read, and they are not at hand"
    torch.where(token_ids < 0, last_token_ids.index_select(0, token_rows), token_ids, out=token_ids)


def _sample_rows(sequences: list[ScheduledSequence], query_start: NDArray[np.int32]) -> NDArray[np.int64]:
    rows: list[int] = []
    for sequence, start, end in zip(sequences, query_start[:-1], query_start[1:], strict=True):
        if sequence.target_ids:
            rows += range(start, end)
        elif sequence.samples:
            rows.append(end - 1)
    return np.array(rows, np.int64)


def _segments(sequences: list[ScheduledSequence]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Neighbouring tokens of one adapter: N + 1 borders and N slots."""
    borders, slots = [0], [NO_SLOT if sequences[0].num_base_tokens else sequences[0].slot]
    end = 0
    for sequence in sequences:
        if sequence.num_base_tokens:
            if slots[-1] != NO_SLOT:
                borders.append(end)
                slots.append(NO_SLOT)
            end += sequence.num_base_tokens
        num_adapted = len(sequence.token_ids) - sequence.num_base_tokens
        if sequence.slot != slots[-1] and num_adapted:
            borders.append(end)
            slots.append(sequence.slot)
        end += num_adapted
    return (*borders, end), tuple(slots)
