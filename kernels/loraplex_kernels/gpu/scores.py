"""Masks, biases, bans, watermark and penalties on rows of scores."""

import triton
import triton.language as tl
from torch import Tensor

from loraplex_kernels.row_state import RowState
from loraplex_kernels.sampling_inputs import Bans, Biases, Masks, Penalties

BLOCK = 4096
ENTRIES = 128


@triton.jit
def _is_in(words, line, num_words, column, size):
    """Whether each token is in a line's set."""
    word = tl.load(words + line.to(tl.int64) * num_words + (column >> 5), mask=column < size, other=0)
    return ((word >> (column & 31)) & 1) != 0


@triton.jit
def _copy_scores(
    logits, row_stride, lines, scores, words, num_words, of_place, size, HAS_MASKS: tl.constexpr, BLOCK: tl.constexpr
):
    place = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    line = tl.load(lines + place).to(tl.int64)
    numbers = tl.load(logits + line * row_stride + column, mask=column < size, other=0.0).to(tl.float32)
    if HAS_MASKS:
        mask = tl.load(of_place + place)
        if mask >= 0:
            numbers = tl.where(_is_in(words, mask, num_words, column, size), numbers, float("-inf"))
    tl.store(scores + place.to(tl.int64) * size + column, numbers, mask=column < size)


@triton.jit(do_not_specialize=["num_entries"])
def _add_biases(scores, places, token_ids, values, num_entries, size, ENTRIES: tl.constexpr):
    entry = tl.program_id(0) * ENTRIES + tl.arange(0, ENTRIES)
    is_entry = entry < num_entries
    cell = tl.load(places + entry, mask=is_entry, other=0).to(tl.int64) * size
    cell += tl.load(token_ids + entry, mask=is_entry, other=0)
    number = tl.load(scores + cell, mask=is_entry, other=0.0)
    tl.store(scores + cell, number + tl.load(values + entry, mask=is_entry, other=0.0), mask=is_entry)


@triton.jit(do_not_specialize=["longest", "num_entries", "capacity"])
def _ban_tokens(
    scores, places, rows, token_ids, until, starts, lengths, runs, longest, num_entries,
    num_tokens, num_prompt, outputs, capacity, size, ENTRIES: tl.constexpr,
):  # fmt: skip
    entry = tl.program_id(0) * ENTRIES + tl.arange(0, ENTRIES)
    is_entry = entry < num_entries
    row = tl.load(rows + entry, mask=is_entry, other=0)
    num_output = tl.load(num_tokens + row, mask=is_entry, other=0) - tl.load(num_prompt + row, mask=is_entry, other=0)
    length = tl.load(lengths + entry, mask=is_entry, other=0)
    start = tl.load(starts + entry, mask=is_entry, other=0)
    holds = is_entry & (num_output < tl.load(until + entry, mask=is_entry, other=0)) & (num_output >= length)
    for i in range(0, longest):
        is_read = holds & (i < length)
        there = tl.load(outputs + row.to(tl.int64) * capacity + num_output - length + i, mask=is_read, other=0)
        holds = holds & (there == tl.load(runs + start + i, mask=is_read, other=0))
    cell = tl.load(places + entry, mask=is_entry, other=0).to(tl.int64) * size
    cell += tl.load(token_ids + entry, mask=is_entry, other=0)
    tl.store(scores + cell, tl.full((ENTRIES,), float("-inf"), tl.float32), mask=holds)


@triton.jit
def _add_to_lists(scores, words, num_words, of_place, value, size, BLOCK: tl.constexpr):
    place = tl.program_id(0)
    line = tl.load(of_place + place)
    if line >= 0:
        column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        cell = scores + place.to(tl.int64) * size + column
        numbers = tl.load(cell, mask=column < size, other=0.0)
        numbers = tl.where(_is_in(words, line, num_words, column, size), numbers + value, numbers)
        tl.store(cell, numbers, mask=column < size)


@triton.jit
def _penalise(
    scores, places, rows, repetition, frequency, presence, count, counts, num_tokens, size, BLOCK: tl.constexpr
):
    entry = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_token = column < size
    row = tl.load(rows + entry).to(tl.int64)
    in_prompt = tl.load(counts + row * 2 * size + column, mask=is_token, other=0)
    in_output = tl.load(counts + (row * 2 + 1) * size + column, mask=is_token, other=0)
    occurrences = in_prompt + in_output
    is_there = is_token & (occurrences > 0)
    cell = scores + tl.load(places + entry).to(tl.int64) * size + column
    numbers = tl.load(cell, mask=is_there, other=0.0)
    factor = tl.load(repetition + entry)
    numbers = tl.where(numbers < 0, numbers * factor, tl.div_rn(numbers, factor))
    share = tl.load(frequency + entry) / tl.load(num_tokens + row).to(tl.float32)
    numbers -= share * occurrences.to(tl.float32)
    numbers -= tl.where(in_output > 0, tl.load(presence + entry), 0.0)
    numbers -= tl.load(count + entry) * in_output.to(tl.float32)
    tl.store(cell, numbers, mask=is_there)


def copy_scores(logits: Tensor, lines: Tensor, masks: Masks | None, scores: Tensor) -> None:
    num_places, size = scores.shape
    words, of_place = (masks.words, masks.of_place) if masks is not None else (lines, lines)
    _copy_scores[num_places, triton.cdiv(size, BLOCK)](
        logits, logits.stride(0), lines, scores, words, words.stride(0), of_place, size,
        HAS_MASKS=masks is not None, BLOCK=BLOCK, num_warps=8,
    )  # fmt: skip


def add_biases(scores: Tensor, biases: Biases) -> None:
    num_entries = len(biases.places)
    _add_biases[(triton.cdiv(num_entries, ENTRIES),)](
        scores, biases.places, biases.token_ids, biases.values, num_entries, scores.shape[1], ENTRIES=ENTRIES
    )


def ban_tokens(scores: Tensor, bans: Bans, state: RowState) -> None:
    num_entries = len(bans.places)
    _ban_tokens[(triton.cdiv(num_entries, ENTRIES),)](
        scores, bans.places, bans.rows, bans.token_ids, bans.until, bans.starts, bans.lengths, bans.runs, bans.longest,
        num_entries, state.num_tokens, state.num_prompt, state.outputs, state.outputs.shape[1], scores.shape[1],
        ENTRIES=ENTRIES,
    )  # fmt: skip


def add_to_lists(scores: Tensor, lists: Masks, value: float) -> None:
    num_places, size = scores.shape
    _add_to_lists[num_places, triton.cdiv(size, BLOCK)](
        scores, lists.words, lists.words.stride(0), lists.of_place, value, size, BLOCK=BLOCK, num_warps=8
    )


def penalise(scores: Tensor, penalties: Penalties, state: RowState) -> None:
    size = scores.shape[1]
    _penalise[len(penalties.places), triton.cdiv(size, BLOCK)](
        scores, penalties.places, penalties.rows, penalties.repetition, penalties.frequency, penalties.presence,
        penalties.count, state.counts, state.num_tokens, size, BLOCK=BLOCK, num_warps=8,
    )  # fmt: skip
