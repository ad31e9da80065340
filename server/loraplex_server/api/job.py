"""GenerationJob (what any dialect asks for) and TextDelta (what it gets back)."""

from dataclasses import dataclass, field
from typing import Literal

import msgspec

from loraplex_server.metrics import Timings
from loraplex_server.text.guides import Guide
from loraplex_server.wanted_merge import WantedMerge

StopReason = Literal["length", "eos_token", "stop_sequence"]


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterAccess:
    """How a request's adapter is to be had: its source, the token for it, and what a split between versions sticks to.

    Left out: the server's default source, no token, and a version drawn anew for every request.
    """

    source: str | None = None
    token: str | None = field(default=None, repr=False)
    split_key: str = ""


NO_ACCESS = AdapterAccess()


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationJob:
    """What a client asks for, in no dialect; None is what it left open. Checked by `Admission`."""

    prompt: str
    prompt_token_ids: tuple[int, ...] | None = None  # in place of `prompt`
    add_special_tokens: bool = True  # a chat template writes them itself
    adapter_id: str | None = None  # None is the base
    merge: WantedMerge | None = None  # several adapters in place of one
    adapter_access: AdapterAccess = NO_ACCESS
    stream: bool = False
    best_of: int | None = None
    max_new_tokens: int | None = None
    do_sample: bool = False
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    typical_p: float | None = None
    repetition_penalty: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    count_penalty: float | None = None  # OpenAI's frequency penalty
    min_p: float | None = None
    logit_bias: dict[int, float] | None = None
    stop_token_ids: tuple[int, ...] = ()
    seed: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    min_new_tokens: int = 0  # neither an end token nor a stop string ends the answer before
    allowed_token_ids: tuple[int, ...] = ()
    bad_words: tuple[str, ...] = ()
    truncate: int | None = None
    truncates_to_fit: bool = False  # the prompt's last tokens, as many as the server takes
    watermark: bool = False
    top_n_tokens: int | None = None
    prompt_logprobs: bool = False  # where the server allows it
    echo_logprobs: bool = False  # the same, whatever the server's setting, and in streams
    num_top_logprobs: int = 0  # as `top_n_tokens`, bounded by its dialect
    num_prompt_logprobs: int = 0  # the same for the prompt, with `echo_logprobs`
    guide: Guide | None = None  # what the text must look like

    @property
    def adapter_name(self) -> str | None:
        """What the log calls the adapter; None is the base."""
        return self.adapter_id if self.merge is None else self.merge.name

    @property
    def samples(self) -> bool:
        """Whether tokens are drawn: asked for, or implied by any parameter that shapes the draw."""
        return (
            self.do_sample
            or self.temperature not in (None, 1.0)
            or self.top_k is not None
            or self.top_p not in (None, 1.0)
            or self.typical_p not in (None, 1.0)
        )


class AlternativeToken(msgspec.Struct, frozen=True):
    """A likely token in another's place, as LoRAX tells it."""

    id: int
    text: str
    logprob: float


class Token(msgspec.Struct, frozen=True):
    """One generated token; its text is "" while it ends inside a character."""

    id: int
    text: str
    logprob: float
    special: bool
    alternative_tokens: list[AlternativeToken] | msgspec.UnsetType = msgspec.UNSET


class PromptToken(msgspec.Struct, frozen=True):
    """One token of the prompt; the first has no log-probability."""

    id: int
    text: str
    logprob: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """The end of one sequence: what a client learns with the last token."""

    text: str
    finish_reason: StopReason
    seed: int | None  # None when tokens were not drawn
    num_prompt_tokens: int
    num_generated_tokens: int
    num_cached_tokens: int = 0  # of the prompt, found in the prefix cache
    prompt_token_ids: list[int] = field(default_factory=list)
    stop_reason: str | int | None = None  # the stop string, or the token of `stop_token_ids`, that ended it
    prompt_tokens: list[PromptToken]
    prompt_top_tokens: list[list[Token]] = field(default_factory=list)  # one list a prompt token, where asked for


@dataclass(frozen=True, slots=True, kw_only=True)
class TextDelta:
    """What one sequence gained; `completion` is there on the last delta and only there."""

    tokens: list[Token]
    top_tokens: list[list[Token]]  # one list a token, or empty when none were asked for
    prompt_token_ids: list[int] | None = None  # there on the first delta and only there
    completion: Completion | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class FinishedSequence:
    """A whole sequence, for answers that are not streamed."""

    completion: Completion
    tokens: list[Token]
    top_tokens: list[list[Token]]

    @property
    def mean_logprob(self) -> float:
        """The measure by which `best_of` picks its winner."""
        return sum(token.logprob for token in self.tokens) / max(len(self.tokens), 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class FinishedJob:
    """The best sequence of a job, the others, and the times."""

    best: FinishedSequence
    others: list[FinishedSequence]
    timings: Timings
