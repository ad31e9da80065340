"""`SamplingParams`: how to choose tokens, with vLLM's names, defaults and bounds."""

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from loraplex.structured_outputs import StructuredOutputsParams, read_guide
from loraplex_server import messages
from loraplex_server.text.guides import Guide

MAX_SEQUENCES = 16_384
# Below it a temperature counts as zero, which is greedy; between it and the next one it is raised, as in vLLM.
GREEDY_TEMPERATURE = 1e-5
LOWEST_TEMPERATURE = 1e-2


@dataclass(kw_only=True)
class SamplingParams:
    """How to choose the next tokens of a prompt; a temperature of 0 takes the likeliest one each time.

    Raises ValueError for a value out of bounds.
    """

    n: int = 1
    best_of: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    structured_outputs: StructuredOutputsParams | Mapping[str, Any] | None = None
    guided_decoding: StructuredOutputsParams | Mapping[str, Any] | None = None  # the older name

    def __post_init__(self) -> None:
        if GREEDY_TEMPERATURE <= self.temperature < LOWEST_TEMPERATURE:
            warnings.warn(
                f"a temperature of {self.temperature} is raised to {LOWEST_TEMPERATURE}: below it scores overflow",
                stacklevel=3,
            )
            self.temperature = LOWEST_TEMPERATURE
        self.stop = [self.stop] if isinstance(self.stop, str) else [*(self.stop or ())]
        self.stop_token_ids = list(dict.fromkeys(self.stop_token_ids or ()))
        if self.seed == -1:
            self.seed = None
        self.check()

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is taken each time."""
        return self.temperature < GREEDY_TEMPERATURE

    @property
    def num_sequences(self) -> int:
        """How many sequences are generated, of which `n` are kept."""
        return self.best_of or self.n

    @property
    def stop_strings(self) -> list[str]:
        """`stop`, always as a list."""
        return [self.stop] if isinstance(self.stop, str) else [*(self.stop or ())]

    @property
    def guide(self) -> Guide | None:
        """What the text must look like, if anything is asked of it. Raises ValueError."""
        if self.structured_outputs is not None and self.guided_decoding is not None:
            raise ValueError("structured_outputs and guided_decoding are the same: give one of them")
        given = self.structured_outputs if self.structured_outputs is not None else self.guided_decoding
        return None if given is None else read_guide(given)

    def check(self) -> None:
        """Raises ValueError; called anew before each use, because fields may have been set meanwhile."""
        self._check_counts()
        self._check_draw()
        if "" in self.stop_strings:
            raise ValueError("stop must not contain an empty string")
        if self.stop_strings and not self.detokenize:
            raise ValueError("stop strings are looked for in the text: they need detokenize=True")
        if self.guide is not None:
            for name in ("ignore_eos", "min_tokens", "allowed_token_ids"):
                if getattr(self, name):
                    raise ValueError(f"{name} cannot be used with structured_outputs, which say what may come and when")

    def _check_counts(self) -> None:
        if not 1 <= self.n <= MAX_SEQUENCES:
            raise ValueError(f"n must be 1 to {MAX_SEQUENCES}. Given: {self.n}")
        if self.best_of is not None and not self.n <= self.best_of <= MAX_SEQUENCES:
            raise ValueError(f"best_of must be n ({self.n}) to {MAX_SEQUENCES}. Given: {self.best_of}")
        if self.is_greedy and self.num_sequences > 1:
            raise ValueError(
                f"n and best_of must be 1 when tokens are not drawn (temperature 0). Given: {self.num_sequences}"
            )
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, or None for all that fits. Given: {self.max_tokens}")
        most = math.inf if self.max_tokens is None else self.max_tokens
        if not 0 <= self.min_tokens <= most:
            raise ValueError(f"min_tokens must be 0 to max_tokens ({most}). Given: {self.min_tokens}")
        if self.allowed_token_ids is not None and not self.allowed_token_ids:
            raise ValueError("allowed_token_ids must name at least one token, or be None for all")
        if not all(isinstance(word, str) and word.strip() for word in self.bad_words or ()):
            raise ValueError(f"bad_words must be words. Given: {self.bad_words!r}")
        for name in ("logprobs", "prompt_logprobs"):
            number = getattr(self, name)
            if number is not None and number < -1:
                raise ValueError(f"{name} must be at least 0, or -1 for the whole vocabulary. Given: {number}")

    def _check_draw(self) -> None:
        if not (self.temperature >= 0 and math.isfinite(self.temperature)):
            raise ValueError(f"temperature must be 0 or more. Given: {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1. Given: {self.top_p}")
        if self.top_k < -1:
            raise ValueError(f"top_k must be at least 1, or 0 or -1 for off. Given: {self.top_k}")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p must be 0 to 1. Given: {self.min_p}")
        for name in ("presence_penalty", "frequency_penalty"):
            if not -2 <= getattr(self, name) <= 2:
                raise ValueError(f"{name} must be -2 to 2. Given: {getattr(self, name)}")
        if not (self.repetition_penalty > 0 and math.isfinite(self.repetition_penalty)):
            raise ValueError(f"repetition_penalty must be above 0. Given: {self.repetition_penalty}")

    def for_engine(
        self, *, max_new_tokens: int, vocab_size: int, seed: int, grammar: str | None = None
    ) -> messages.SamplingParams:
        """The same for one sequence in the engine's words; `grammar` is what became of the guide."""
        return messages.SamplingParams(
            max_new_tokens=max_new_tokens,
            do_sample=not self.is_greedy,
            temperature=1.0 if self.is_greedy else self.temperature,
            top_k=max(self.top_k, 0),
            top_p=self.top_p,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            count_penalty=self.frequency_penalty,
            logit_bias=self.logit_bias or {},
            seed=seed,
            stop_token_ids=tuple(self.stop_token_ids or ()),
            ignore_eos=self.ignore_eos,
            guide=grammar,
            num_logprobs=_number(self.logprobs, vocab_size),
            prompt_logprobs=self.prompt_logprobs is not None,
            num_prompt_logprobs=_number(self.prompt_logprobs, vocab_size),
        )


def _number(wanted: int | None, vocab_size: int) -> int:
    return vocab_size if wanted == -1 else wanted or 0
