"""The wire vocabulary: all that the API process and the engine say to each other, as msgpack."""

from typing import Literal

import msgspec

from loraplex_models.adapters.merge_recipe import MergeRecipe

FinishReason = Literal["length", "eos_token", "stop_sequence", "cancelled", "error"]


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """How to choose the next tokens; checked against the bounds before it is made.

    Off: top_k 0, top_p 1, typical_p 1, min_p 0, repetition_penalty 1, the other penalties 0.
    Without `do_sample` the most likely token is taken and temperature and the cuts are not applied.
    """

    max_new_tokens: int
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    typical_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    count_penalty: float = 0.0  # OpenAI's frequency penalty: times the token's count in the output
    logit_bias: dict[int, float] = {}  # added to the scores of these tokens
    watermark: bool = False
    seed: int = 0  # 0 … 2^64 - 1
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    min_new_tokens: int = 0  # `held_back_token_ids`, those that end a sequence, are not chosen before
    held_back_token_ids: tuple[int, ...] = ()
    allowed_token_ids: tuple[int, ...] = ()  # no others are chosen; empty for all
    bad_words: tuple[tuple[int, ...], ...] = ()  # runs of tokens that are never completed
    num_logprobs: int = 0  # most likely tokens to report beside the chosen one
    prompt_logprobs: bool = False
    guide: str | None = None  # a grammar in llguidance's notation that the output must follow to its end
    num_prompt_logprobs: int = 0  # with `prompt_logprobs`: most likely tokens to report beside each of the prompt


class AdapterSpec(msgspec.Struct, frozen=True, kw_only=True):
    """An adapter whose files are on this machine and whose header was checked; or several of them that make one."""

    adapter_id: str
    digest: str  # of the files' bytes, or of the recipe: what the weights are, whatever the name
    path: str  # of the files; empty for a merge
    rank: int  # the largest over its modules
    num_bytes: int
    source: str = "local"
    revision: str | None = None
    # What it takes on a device, by `loraplex_models.adapters.pages`: kinds of linears with a rank and the number of
    # layers that have it, and the elements of all else.
    rank_rows: tuple[tuple[str, int, int], ...] = ()
    dense_elements: int = 0
    # Activated LoRA: it acts from the start of this sequence's last occurrence in the prompt, and not without it.
    invocation_token_ids: tuple[int, ...] = ()
    merge: MergeRecipe | None = None


class GenerateRequest(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """One prompt, already tokenised and checked against the limits."""

    request_id: str
    prompt_token_ids: list[int]
    sampling: SamplingParams
    adapter_id: str | None = None
    adapter_digest: str | None = None  # the version that was resolved at admission; null for the base
    tenant: str | None = None  # shares its turn with other requests of the same one; null: with those of its adapter
    cache_salt: str | None = None  # keys and values are shared only with requests of the same salt
    priority: int = 0
    arrival_time: float = 0.0  # seconds, time.monotonic of this machine


class AbortRequest(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The client left, a stop string was found, or a deadline passed: no more tokens are wanted."""

    request_id: str


class LoadAdapter(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Make an adapter's digest known to the engine, which then loads it when it is needed."""

    spec: AdapterSpec


class KeepAdapter(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Have a digest ready although nobody waits for it, and evict it last; or treat it like the others again."""

    digest: str
    is_kept: bool


class UnloadAdapter(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Forget a digest; its memory is given back when no sequence uses it."""

    digest: str


class TopLogprob(msgspec.Struct, frozen=True, array_like=True):
    """A likely token and its natural-log probability."""

    token_id: int
    logprob: float


class TokenOutput(msgspec.Struct, frozen=True, kw_only=True):
    """What one request gained in one step.

    `prompt_logprobs` comes once, with the first token, when it was asked for: one value a prompt token, the
    first null. `queue_time_s` too comes with the first token: from arrival to the first step that ran it.
    `error` is set with finish_reason "error", and then there may be no token.
    """

    request_id: str
    token_ids: list[int] = []
    logprobs: list[float] = []
    top_logprobs: list[list[TopLogprob]] = []
    finish_reason: FinishReason | None = None
    num_cached_tokens: int = 0
    prompt_logprobs: list[float | None] | None = None
    prompt_top_logprobs: list[list[TopLogprob]] = []  # beside `prompt_logprobs`, when `num_prompt_logprobs` asks for it
    queue_time_s: float | None = None
    error: str | None = None


class EngineStats(msgspec.Struct, frozen=True, kw_only=True):
    """Gauges of now and what was counted since the message before."""

    num_running: int = 0
    num_waiting: int = 0
    num_waiting_for_adapter: int = 0
    num_kv_blocks: int = 0
    num_kv_blocks_used: int = 0  # held by sequences; blocks kept only for prefix hits are free
    num_running_tokens: int = 0  # tokens that the running sequences hold in the KV cache
    num_adapters_registered: int = 0
    num_adapters_in_host: int = 0
    num_adapters_resident: int = 0
    adapter_host_bytes: int = 0
    adapter_device_bytes: int = 0
    num_adapter_pins: int = 0
    num_host_loads: int = 0  # adapters, since the last report; so for the four below
    num_device_loads: int = 0
    num_host_evictions: int = 0
    num_device_evictions: int = 0
    num_failed_loads: int = 0
    host_load_s: list[float] = []
    device_load_s: list[float] = []
    adapter_wait_s: list[float] = []  # one value a request whose adapter was not on the device: arrival to first step
    resident_adapter_ids: list[str] = []
    running_adapters: dict[str, int] = {}
    waiting_adapters: dict[str, int] = {}
    num_preemptions: int = 0
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_generated_tokens: int = 0
    prefill_step_s: list[float] = []  # one value a step that held prompt tokens
    decode_step_s: list[float] = []
    forward_s: list[float] = []
    sample_s: list[float] = []


class StepOutput(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """All that one step gave, for every request in it."""

    outputs: list[TokenOutput]
    stats: EngineStats | None = None


class EngineReady(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The engine can serve; the limits it settled on."""

    max_input_tokens: int
    max_total_tokens: int
    max_batch_prefill_tokens: int
    max_batch_total_tokens: int
    max_batch_size: int
    num_kv_blocks: int
    block_size: int
    vocab_size: int
    end_token_ids: list[int]
    dtype: str
    device: str
    max_loras: int
    adapter_host_budget_bytes: int = 0
    adapter_device_budget_bytes: int = 0


class AdapterStatus(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Where an adapter is now, or why it could not be loaded."""

    adapter_id: str
    digest: str
    tier: Literal["disk", "host", "device", "gone"]
    num_bytes: int = 0  # in host memory
    device_bytes: int = 0
    error: str | None = None


ToEngine = GenerateRequest | AbortRequest | LoadAdapter | KeepAdapter | UnloadAdapter
FromEngine = StepOutput | EngineReady | AdapterStatus

encode = msgspec.msgpack.Encoder().encode
decode_to_engine = msgspec.msgpack.Decoder(ToEngine).decode
decode_from_engine = msgspec.msgpack.Decoder(FromEngine).decode
