"""From a plan to tensors: positions, cells and rows, checked by hand on blocks of four."""

import pytest
import torch

from loraplex_server.engine.batch_builder import BatchBuilder
from loraplex_server.engine.step import FUTURE_TOKEN, ScheduledSequence, StepPlan

SIZE = 4


class RecordingSlots:
    """Stands where the adapter slots stand, and gives back what it was asked."""

    def route(self, segment_start: tuple[int, ...], segment_slots: tuple[int, ...]):
        return segment_start, segment_slots


def builder(num_rows: int = 4, max_blocks: int = 5) -> BatchBuilder:
    made = BatchBuilder(num_rows, max_blocks, SIZE, RecordingSlots(), torch.device("cpu"))  # type: ignore[arg-type]
    for row in range(num_rows):
        made.start_row(row)
    return made


def part(row: int, token_ids: list[int], start: int, new_block_ids: list[int], **fields) -> ScheduledSequence:
    defaults = {"slot": -1, "samples": True}
    return ScheduledSequence(
        row=row, token_ids=token_ids, start=start, new_block_ids=new_block_ids, **(defaults | fields)
    )


def plan(*sequences: ScheduledSequence, num_decodes: int = 0) -> StepPlan:
    return StepPlan(step_id=1, sequences=list(sequences), num_decodes=num_decodes)


def test_a_chunk_goes_to_the_cells_of_its_blocks_in_order():
    batch = builder().build(plan(part(2, [10, 11, 12, 13, 14, 15], 0, [7, 3])))
    assert batch.token_ids.tolist() == [10, 11, 12, 13, 14, 15]
    assert batch.positions.tolist() == [0, 1, 2, 3, 4, 5]
    assert batch.attention.slot_mapping.tolist() == [28, 29, 30, 31, 12, 13]
    assert batch.attention.block_table.tolist() == [[7, 3]]
    assert (batch.attention.max_query_len, batch.attention.max_seq_len) == (6, 6)
    assert batch.sample_rows.tolist() == [5]


def test_the_next_steps_continue_in_the_row_and_add_blocks_at_borders():
    rows = builder()
    rows.build(plan(part(0, [1, 2, 3], 0, [5], samples=False), part(1, [4] * 4, 0, [6])))
    batch = rows.build(plan(part(1, [9], 4, [8]), part(0, [7, 7], 3, [2]), num_decodes=1))
    attention = batch.attention
    assert attention.num_decodes == 1
    assert attention.query_start.tolist() == [0, 1, 3]
    assert attention.seq_lens.tolist() == [5, 5]
    assert attention.block_table.tolist() == [[6, 8], [5, 2]]
    assert attention.slot_mapping.tolist() == [32, 23, 8]
    assert batch.positions.tolist() == [4, 3, 4]


def test_a_reused_row_forgets_its_blocks_and_what_lies_beyond_a_sequence_is_block_zero():
    rows = builder()
    rows.build(plan(part(0, [1] * 12, 0, [9, 8, 7]), part(1, [2] * 9, 0, [4, 5, 6])))
    rows.start_row(0)
    batch = rows.build(plan(part(1, [3], 9, []), part(0, [1, 1], 0, [2]), num_decodes=1))
    assert batch.attention.block_table.tolist() == [[4, 5, 6], [2, 0, 0]]


def test_a_token_that_nobody_has_read_is_the_one_that_its_row_chose_last():
    rows = builder()
    start = plan(part(3, [4, 5], 0, [6]), part(1, [7], 0, [5]), part(0, [8], 0, [2]))
    rows.build(start)
    step = plan(part(3, [FUTURE_TOKEN], 2, []), part(0, [9], 1, []), part(1, [FUTURE_TOKEN], 1, []), num_decodes=3)
    batch = rows.build(step, torch.tensor([10, 11, 12, 13]))
    assert batch.token_ids.tolist() == [13, 9, 11]
    with pytest.raises(AssertionError, match="nobody has read"):
        builder().build(plan(part(2, [FUTURE_TOKEN], 0, [0]), num_decodes=1))


def test_a_chunk_without_a_sample_gives_no_logits_and_one_with_targets_gives_all():
    batch = builder().build(
        plan(
            part(0, [1], 0, [0]),
            part(1, [1, 2], 0, [1], samples=False),
            part(2, [1, 2, 3], 0, [2], samples=False, target_ids=[2, 3, 4]),
            part(3, [1, 2], 0, [3]),
            num_decodes=1,
        )
    )
    assert batch.sample_rows.tolist() == [0, 3, 4, 5, 7]


def test_neighbours_of_one_adapter_are_one_segment():
    batch = builder().build(
        plan(
            part(0, [1], 0, [0], slot=-1),
            part(1, [1], 0, [1], slot=2),
            part(2, [1, 2], 0, [2], slot=2),
            part(3, [1, 2], 0, [3], slot=0),
            num_decodes=2,
        )
    )
    assert batch.lora == ((0, 1, 4, 6), (-1, 2, 0))
