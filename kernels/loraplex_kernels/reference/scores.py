"""What changes scores in plain torch, one place and one entry at a time."""

import torch
from torch import Tensor

from loraplex_kernels.row_state import RowState
from loraplex_kernels.sampling_inputs import Bans, Biases, Masks, Penalties


def copy_scores(logits: Tensor, lines: Tensor, masks: Masks | None, scores: Tensor) -> None:
    scores.copy_(logits[lines.long()])
    if masks is not None:
        for place, mask in enumerate(masks.of_place.tolist()):
            if mask >= 0:
                scores[place, ~_bits(masks.words[mask], scores.shape[1])] = -torch.inf


def add_biases(scores: Tensor, biases: Biases) -> None:
    scores.index_put_((biases.places.long(), biases.token_ids.long()), biases.values, accumulate=True)


def ban_tokens(scores: Tensor, bans: Bans, state: RowState) -> None:
    columns = (bans.places, bans.rows, bans.token_ids, bans.until, bans.starts, bans.lengths)
    for place, row, token_id, until, start, length in zip(*(column.tolist() for column in columns), strict=True):
        num_output = int(state.num_tokens[row] - state.num_prompt[row])
        if length <= num_output < until:
            end = state.outputs[row, num_output - length : num_output]
            if torch.equal(end, bans.runs[start : start + length]):
                scores[place, token_id] = -torch.inf


def add_to_lists(scores: Tensor, lists: Masks, value: float) -> None:
    for place, line in enumerate(lists.of_place.tolist()):
        if line >= 0:
            scores[place, _bits(lists.words[line], scores.shape[1])] += value


def penalise(scores: Tensor, penalties: Penalties, state: RowState) -> None:
    for i, (place, row) in enumerate(zip(penalties.places.tolist(), penalties.rows.tolist(), strict=True)):
        in_prompt, in_output = state.counts[row]
        numbers, occurrences = scores[place], in_prompt + in_output
        repeated = torch.where(numbers < 0, numbers * penalties.repetition[i], numbers / penalties.repetition[i])
        numbers = torch.where(occurrences > 0, repeated, numbers)
        numbers = numbers - penalties.frequency[i] / state.num_tokens[row] * occurrences
        numbers = numbers - penalties.presence[i] * (in_output > 0)
        scores[place] = numbers - penalties.count[i] * in_output


def _bits(words: Tensor, size: int) -> Tensor:
    return ((words[:, None] >> torch.arange(32)) & 1).bool().flatten()[:size]
