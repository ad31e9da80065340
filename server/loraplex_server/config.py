"""Every setting, in frozen dataclasses; the flags, environment names and the settings page are derived from them."""

from dataclasses import dataclass, field
from typing import Any

from loraplex_models.s3_access import S3Access
from loraplex_server.messages import AdapterSpec


def setting(
    default: Any,
    help_text: str,
    *,
    flag: str | None = None,
    choices: tuple[str, ...] = (),
    minimum: int | None = None,
) -> Any:
    """Declare a setting: its default, one line of help, its flag where that is not the field's name, its bounds."""
    metadata = {"help": help_text, "flag": flag, "choices": choices, "minimum": minimum}
    return field(default=default, metadata=metadata)


FAIRNESS_KEY_PATTERN = r"adapter|api-key|none|header:[A-Za-z0-9_-]+"
DTYPES = ("float16", "bfloat16", "float32")
DEVICES = ("auto", "cpu", "cuda")
# A chunk of a prompt delays the tokens of the rows beside it: by half a second or so on a few cores with a small model,
# on a GPU by some 20 microseconds a token of an 8B model, which from about a thousand tokens on computes no faster.
CPU_PREFILL_TOKENS, GPU_PREFILL_TOKENS = 512, 2048
REASONING_PARSERS = ("none", "think", "qwen3", "deepseek_r1")
TOOL_CALL_PARSERS = ("auto", "hermes", "json", "llama3_json", "mistral")


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchConfig:
    """What only the launcher needs: where the model and the adapters come from."""

    model_id: str | None = setting(None, "base model: a local folder or a hub id, which may end in @revision")
    revision: str | None = setting(None, "hub revision of the base model: branch, tag or commit")
    served_model_name: str | None = setting(None, "name that /info and /v1/models show; absent: the model id")
    lora_adapters: tuple[str, ...] = setting((), "adapters, comma-separated: id, id@revision or name=path; repeatable")
    huggingface_hub_cache: str | None = setting(None, "folder of downloads from the hub")
    weights_cache_override: str | None = setting(None, "folder to take all files of the base model from")
    sharded: bool | None = setting(None, "true: use all visible GPUs; false: one rank")
    num_shard: int | None = setting(
        None, "tensor-parallel ranks; absent: one for each visible GPU, on the CPU one", minimum=1
    )
    nnodes: int = setting(1, "machines that share the ranks evenly; each runs its own launcher", minimum=1)
    node_rank: int = setting(0, "number of this machine among them; the API is served by number 0", minimum=0)
    master_addr: str = setting("localhost", "with several machines: address of number 0, as the others reach it")
    master_port: int = setting(29500, "with several machines: port on which number 0 waits for the others", minimum=1)
    max_engine_restarts: int | None = setting(
        None,
        "how often in a row a lost engine is started again before the launcher ends; absent: 5 with several ranks, 0 "
        "with one",
        minimum=0,
    )
    hub_token: str | None = None  # a secret: from the environment only, never from a command line that others can read
    hub_endpoint: str | None = None
    hub_offline: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterConfig:
    """The adapters known at start and the room they may take."""

    sources: tuple[AdapterSpec, ...] = ()
    max_lora_rank: int = setting(512, "highest LoRA rank served; an adapter above it is refused", minimum=1)
    max_resident_adapters: int = setting(
        64, "adapters held ready for the model at a time; others wait in host memory", minimum=1
    )
    adapter_host_memory: str = setting(
        "4GiB",
        "host memory for adapter weights: bytes (4GiB, 512MiB) or a share of the free memory (0.2); "
        "with a GPU it is taken and pinned at start",
    )
    adapter_device_memory: str = setting(
        "2GiB", "memory for the adapters that are ready for the model, in the same form; on a CPU it is host memory"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """One engine, over all its ranks."""

    model_path: str = ""  # a local folder: the launcher has resolved and downloaded it
    dtype: str = setting(
        "auto", "type of weights and computation; auto takes the checkpoint's", choices=("auto", *DTYPES)
    )
    device: str = setting("auto", "where the model runs; auto: on a GPU where one is visible", choices=DEVICES)
    num_ranks: int = 1  # tensor-parallel, over all machines
    num_local_ranks: int = 1  # those on this machine
    quantize: str | None = setting(
        None, "weight format of the checkpoint, found by itself when absent; or what plain weights become while loading"
    )
    modeling: str = setting(
        "auto",
        "whose code runs the model: auto is ours; transformers is that package's, for families that are not ours: "
        "slower, on a CPU only",
        choices=("auto", "transformers"),
    )
    rope_scaling: str | None = setting(None, "RoPE scaling kind", choices=("linear", "dynamic"))
    rope_factor: float | None = setting(None, "RoPE scaling factor")
    block_size: int = setting(16, "tokens in a KV block", minimum=1)
    num_kv_blocks: int = setting(0, "KV blocks; 0 shares out the memory that is left after the weights", minimum=0)
    kv_memory_fraction: float = setting(0.4, "CPU: share of the free memory that the KV cache may take")
    prefix_caching: bool = setting(True, "reuse the KV blocks of shared prompt heads")
    max_input_tokens: int = setting(0, "longest prompt in tokens; 0 means one less than max_total_tokens", minimum=0)
    max_total_tokens: int = setting(
        0, "prompt and output of a request; 0 means what model and KV cache allow", minimum=0
    )
    max_batch_prefill_tokens: int = setting(
        0, "prompt tokens computed in one step (chunked prefill); 0 means 512 on a CPU, 2048 on a GPU", minimum=0
    )
    max_batch_total_tokens: int = setting(0, "tokens of all running sequences; 0 means the KV cache's size", minimum=0)
    max_batch_size: int = setting(64, "most sequences in a step", minimum=1)
    overlap_steps: str = setting(
        "auto",
        "plan and launch a step while the one before runs, its tokens not yet read; auto: on a GPU",
        choices=("auto", "on", "off"),
    )
    starvation_bound_s: float = setting(
        5.0, "seconds in the queue after which a request goes before all others, and running ones may have to give way"
    )
    check_kernels: bool = setting(
        True, "GPU: compare each kernel with plain torch when a kind of GPU is met for the first time"
    )
    attention_backend: str = setting(
        "triton",
        "GPU: whose kernels let prompts attend; flashinfer is an optional package (pip install 'loraplex[flashinfer]')",
        choices=("triton", "flashinfer"),
    )
    cuda_memory_fraction: float = setting(1.0, "GPU: share of its memory that may be taken")
    num_threads: int = setting(0, "CPU threads of the engine; 0 means min(cores, 4), or OMP_NUM_THREADS", minimum=0)
    enable_prefill_logprobs: bool = setting(False, "allow log-probabilities of the prompt's tokens")
    watermark_gamma: float = setting(0.5, "share of the vocabulary on the watermark's green list")
    watermark_delta: float = setting(2.0, "bias of the watermark's green list")
    adapters: AdapterConfig = field(default_factory=AdapterConfig)

    @property
    def prefill_tokens(self) -> int:
        """Prompt tokens computed in one step, on the device that the launcher has chosen."""
        return self.max_batch_prefill_tokens or (GPU_PREFILL_TOKENS if self.device == "cuda" else CPU_PREFILL_TOKENS)


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiConfig:
    """The API process: where it listens and what it lets in."""

    model_id: str = ""  # the name that /info and /v1/models show
    model_sha: str | None = None
    hostname: str = setting("0.0.0.0", "address to listen on")
    port: int = setting(3000, "port to listen on", minimum=1)
    max_concurrent_requests: int = setting(128, "requests in flight; more are answered 429", minimum=1)
    max_best_of: int = setting(2, "upper bound of best_of", minimum=1)
    max_stop_sequences: int = setting(4, "upper bound of the number of stop sequences", minimum=0)
    max_top_n_tokens: int = setting(5, "upper bound of top_n_tokens", minimum=0)
    max_client_batch_size: int = setting(4, "most prompts in one completions request", minimum=1)
    validation_workers: int = setting(2, "threads that tokenise prompts", minimum=1)
    payload_limit: int = setting(2_000_000, "largest request body in bytes", minimum=1)
    cors_allow_origin: tuple[str, ...] = setting((), "allowed origins; none given allows any")
    api_key: tuple[str, ...] = setting((), "bearer key required on every route but health and metrics; repeatable")
    fairness_key: str = setting(
        "adapter", "whom waiting requests take turns between: adapter, api-key, header:NAME, or none (first come)"
    )
    tokenizer_config_path: str | None = setting(None, "tokenizer_config.json to use instead of the model's")
    chat_template: str | None = setting(None, "file with the chat template (Jinja) to use instead of the model's")
    adapter_chat_templates: bool = setting(
        False, "use the chat template that an adapter's folder holds for its chats; off: the model's for all"
    )
    disable_grammar_support: bool = setting(False, "refuse grammars")
    tool_call_parser: str = setting(
        "auto", "how the model writes calls of tools; auto asks its chat template", choices=TOOL_CALL_PARSERS
    )
    reasoning_parser: str = setting(
        "none",
        "how the model writes what it thinks, which chats then show apart: think (or qwen3) for `<think>…</think>`, "
        "deepseek_r1 also where nothing opens it",
        choices=REASONING_PARSERS,
    )
    graceful_termination_timeout: int = setting(90, "seconds to let running requests finish on SIGTERM", minimum=0)
    json_output: bool = setting(False, "log as one JSON object a line")
    log_level: str = setting("info", "least important lines that are logged: error, warn, info or debug")
    compute_type: str | None = setting(
        None, "text of the x-compute-type header; absent: cpu+optimized or gpu+optimized"
    )
    otlp_endpoint: str | None = setting(None, "OTLP collector for traces")
    otlp_service_name: str = setting("text-generation-inference.router", "service name in traces")


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterSourceConfig:
    """Adapters that come while the server runs: where from, who may bring them, and what they may cost."""

    dynamic_adapters: bool = setting(
        False, "fetch an adapter that a request names from its source on first use; off, an unknown name is 404"
    )
    default_adapter_source: str = setting(
        "hub",
        "source of a dynamic adapter when the request names none",
        flag="--adapter-source",
        choices=("hub", "local", "s3", "pbase"),
    )
    adapter_root: tuple[str, ...] = setting(
        (), "folder below which requests may name adapters (source local); none given means none; repeatable"
    )
    adapter_bucket: tuple[str, ...] = setting(
        (),
        "bucket, or bucket/prefix, where requests may name adapters (source s3); none given means none; repeatable",
    )
    adapter_list: str | None = setting(
        None,
        "file of adapters, one a line as in --lora-adapters or a merge as JSON; each is looked at on its first use",
    )
    adapter_state: str | None = setting(
        None,
        "folder that keeps names, versions, splits, pins and uploads of adapters for the next start, in place of "
        "--adapter-cache; absent: they live as long as the server",
    )
    adapter_cache: str = setting("", "folder for downloaded and uploaded adapters; absent: one in the user's cache")
    adapter_cache_mb: int = setting(65536, "disk space for downloaded and uploaded adapters, in MiB", minimum=1)
    max_adapter_mb: int = setting(8192, "largest adapter that is downloaded or uploaded, in MiB", minimum=1)
    adapter_fetch_timeout: int = setting(120, "seconds that fetching an adapter may take", minimum=1)
    max_adapter_fetches: int = setting(4, "adapters fetched at a time; further ones wait", minimum=1)
    share_hub_token: bool = setting(
        False, "let every caller's dynamic adapters use the server's hub token; off, only the caller's own api_token"
    )
    trust_pickle_adapters: bool = setting(
        False, "convert adapters that have only pickled weights (adapter_model.bin), by weights only and apart"
    )
    admin_api_key: str | None = setting(None, "bearer key that may change adapters while the server runs")
    allow_runtime_adapters: bool = setting(
        False, "without an admin key: let every caller change adapters while the server runs"
    )
    hub_token: str | None = None
    hub_endpoint: str | None = None
    hub_offline: bool = False
    s3: S3Access = field(default_factory=S3Access)
    s3_folder: str = ""  # bucket, or bucket/prefix, that names without one are relative to
    predibase_gateway: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeConfig:
    """What the launcher hands to each process it starts, as JSON."""

    api: ApiConfig = field(default_factory=ApiConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    adapter_sources: AdapterSourceConfig = field(default_factory=AdapterSourceConfig)
    link_address: str = ""  # a private folder (mode 0700) for the link's sockets
    rendezvous: str = ""  # where the ranks of this start meet, see ParallelGroup.join; empty for one rank
