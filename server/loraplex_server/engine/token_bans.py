"""Tokens that a row may not choose: end tokens before its least length, all but the allowed ones, the ends of bad
words."""

from collections.abc import Sequence

import torch
from torch import Tensor

from loraplex_server.messages import SamplingParams


class _RowBans:
    """What one row may not choose next."""

    def __init__(self, params: SamplingParams, output_token_ids: Sequence[int]):
        self._least = params.min_new_tokens
        self._held_back = list(params.held_back_token_ids)
        self._allowed = list(params.allowed_token_ids)
        self._bad_words = [tuple(word) for word in params.bad_words]
        self._num_output = len(output_token_ids)
        # As far back as the longest bad word looks.
        self._longest = max((len(word) for word in self._bad_words), default=1) - 1
        self._tail = tuple(output_token_ids[-self._longest :]) if self._longest else ()

    def cut(self, scores: Tensor) -> None:
        """Take the banned tokens out of a row's scores, in place. scores: [vocab]."""
        if self._allowed:
            allowed = torch.tensor(self._allowed, device=scores.device)
            kept = scores[allowed]
            scores.fill_(-torch.inf)
            scores[allowed] = kept
        banned = [word[-1] for word in self._bad_words if self._ends_with(word[:-1])]
        if self._num_output < self._least:
            banned += self._held_back
        if banned:
            scores[torch.tensor(banned, device=scores.device)] = -torch.inf

    def _ends_with(self, token_ids: tuple[int, ...]) -> bool:
        return not token_ids or self._tail[-len(token_ids) :] == token_ids

    def add(self, token_id: int) -> None:
        """The row chose a token."""
        self._num_output += 1
        if self._longest:
            self._tail = (*self._tail, token_id)[-self._longest :]


class TokenBans:
    """The rows that have bans, and how far each has come."""

    def __init__(self) -> None:
        self._rows: dict[int, _RowBans] = {}

    def start(self, row: int, params: SamplingParams, output_token_ids: Sequence[int]) -> None:
        """Put a sequence into a row; `output_token_ids` is what it has generated before."""
        self._rows[row] = _RowBans(params, output_token_ids)

    def stop(self, row: int) -> None:
        """Free a row."""
        del self._rows[row]

    def cut(self, logits: Tensor, lines: Sequence[int], rows: Sequence[int]) -> None:
        """Take the banned tokens out of the `lines` of `logits`, which belong to `rows`, in place."""
        for line, row in zip(lines, rows, strict=True):
            self._rows[row].cut(logits[line])

    def advance(self, row: int, token_id: int) -> None:
        """The row chose a token."""
        self._rows[row].add(token_id)


def has_bans(params: SamplingParams) -> bool:
    """Whether a sequence has any."""
    return bool(params.min_new_tokens or params.allowed_token_ids or params.bad_words)
