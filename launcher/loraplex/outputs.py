"""What `LLM` gives back, in vLLM's shapes."""

from dataclasses import dataclass

from loraplex.lora_request import LoRARequest


@dataclass(frozen=True, slots=True)
class Logprob:
    """A token's log-probability. `rank` is 1 for the likeliest; None for a token below those that were asked for."""

    logprob: float
    rank: int | None
    decoded_token: str | None


LogprobsOfToken = dict[int, Logprob]


@dataclass(slots=True, kw_only=True)
class CompletionOutput:
    """One generated sequence.

    `finish_reason` is "stop", "length" or "error"; `stop_reason` is the stop string or the id of `stop_token_ids` that
    ended it, None for the model's own end token. `error` says why when the engine failed on this sequence alone.
    """

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float
    logprobs: list[LogprobsOfToken] | None
    finish_reason: str
    stop_reason: str | int | None
    lora_request: LoRARequest | None = None
    error: str | None = None

    def finished(self) -> bool:
        """Whether the sequence has ended, which it has when `LLM` hands it over."""
        return True


@dataclass(slots=True, kw_only=True)
class RequestOutput:
    """One prompt and all that was generated for it. `prompt` is None where token ids were given."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    prompt_logprobs: list[LogprobsOfToken | None] | None
    outputs: list[CompletionOutput]
    finished: bool
    lora_request: LoRARequest | None
    num_cached_tokens: int
