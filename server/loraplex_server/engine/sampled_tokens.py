"""What a sampler gives: the tokens of a step, at once on a CPU, or when the GPU has come to them."""

from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from loraplex_server.messages import SamplingParams, TopLogprob

NO_TOKEN = -1
"""Stands in place of a token id where a row's logits gave none (a NaN, +inf, or nothing but -inf)."""


@dataclass(frozen=True, slots=True)
class SampledTokens:
    """What one step drew, one entry a sampled row.

    Log-probabilities are those of the processed scores, after penalties and cuts. `top_logprobs` holds exactly as
    many tokens as were asked for, ties by the lower id, fewer only where the cuts left fewer; empty when not asked.
    A row whose logits were broken has the token id NO_TOKEN and log-probability 0, and keeps its state; so has a row
    whose grammar cannot go on, and `problems` says why, by row.
    """

    token_ids: list[int]
    logprobs: list[float]
    top_logprobs: list[list[TopLogprob]]
    problems: dict[int, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class PromptLogprobs:
    """The log-probabilities of given tokens under raw logits, and each line's likeliest tokens where asked for."""

    logprobs: list[float]
    top_logprobs: list[list[TopLogprob]]


class PendingTokens(Protocol):
    """Tokens that were launched."""

    def read(self) -> SampledTokens:
        """Wait for them. Once, and in the order of the launches: grammars advance by what is read."""


class PendingPrompt(Protocol):
    """Log-probabilities of a prompt that were launched."""

    def read(self) -> PromptLogprobs:
        """Wait for them."""


class TokenSampler(Protocol):
    """Chooses the next token of each row, by the parameters of the sequence that is in the row."""

    @property
    def last_token_ids(self) -> Tensor:
        """What each row was given last, [rows] int64 on the device, as soon as the device has come to it.

        A step that is launched before its tokens were read takes them from there. A row whose logits were broken has
        some token of the vocabulary.
        """

    def add(self, row: int, params: SamplingParams, token_ids: list[int], num_output_tokens: int = 0) -> None:
        """Put a sequence into a free row: its tokens so far, of which the last `num_output_tokens` are output."""

    def remove(self, row: int) -> None:
        """Free a row; what it knew is forgotten. Tokens that were launched can still be read."""

    def launch(self, logits: Tensor, rows: list[int], lines: list[int] | None = None) -> PendingTokens:
        """Begin to choose a token for each row; each counts as the row's last one for the next launch.

        logits: [lines, vocab], float; `lines` names the line of each row, by default they are in the same order. The
        logits may be changed.
        """

    def launch_prompt(self, logits: Tensor, token_ids: list[int], row: int) -> PendingPrompt:
        """Begin to read the log-probability of each given token, one a line of raw logits [tokens, vocab], which stay.

        With them as many of the likeliest tokens as the row's sequence asks for in its prompt.
        """


@dataclass(frozen=True, slots=True)
class ReadyTokens:
    """Tokens that are there already."""

    tokens: SampledTokens

    def read(self) -> SampledTokens:
        """The tokens."""
        return self.tokens


@dataclass(frozen=True, slots=True)
class ReadyPrompt:
    """Log-probabilities of a prompt that are there already."""

    logprobs: PromptLogprobs

    def read(self) -> PromptLogprobs:
        """The log-probabilities."""
        return self.logprobs
