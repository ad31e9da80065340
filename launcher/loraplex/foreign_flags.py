"""Flags of TGI, LoRAX and vLLM that are other names for a setting of ours, or that have no meaning here."""

import json
from dataclasses import dataclass

# A second or third spelling of a setting's flag: name of the setting → flags.
ALIASES: dict[str, tuple[str, ...]] = {
    "model_id": ("--model",),
    "hostname": ("--host",),
    "port": ("-p",),
    "lora_adapters": ("--lora-modules", "--lora-paths", "--preloaded-adapter-ids"),
    "max_resident_adapters": ("--max-loras", "--max-loras-per-batch", "--max-active-adapters"),
    "adapter_device_memory": ("--adapter-memory-fraction",),
    "num_shard": ("--tensor-parallel-size", "-tp"),
    "max_batch_size": ("--max-num-seqs",),
    "max_total_tokens": ("--max-model-len",),
    "max_batch_prefill_tokens": ("--max-num-batched-tokens",),
    "graceful_termination_timeout": ("-g", "--shutdown-timeout"),
    "default_adapter_source": ("--default-adapter-source",),
    "huggingface_hub_cache": ("--download-dir",),
    "quantize": ("--quantization", "-q"),
    "cuda_memory_fraction": ("--gpu-memory-utilization",),
    "prefix_caching": ("--enable-prefix-caching/--no-enable-prefix-caching",),
}

# What SageMaker calls a setting of ours in the environment of TGI's image for it: read where our own name is not set.
FOREIGN_VARIABLES: dict[str, str] = {
    "model_id": "HF_MODEL_ID",
    "revision": "HF_MODEL_REVISION",
    "num_shard": "SM_NUM_GPUS",
    "quantize": "HF_MODEL_QUANTIZE",
}

# Variables of vLLM and LoRAX that switch a setting of ours on.
FOREIGN_SWITCHES: dict[str, str] = {
    "allow_runtime_adapters": "VLLM_ALLOW_RUNTIME_LORA_UPDATING",
    "share_hub_token": "LORAX_USE_GLOBAL_HF_TOKEN",
}


@dataclass(frozen=True, slots=True)
class IgnoredFlag:
    """A flag that is taken and has no effect; `takes_value` tells it from a switch, `is_read` whether it also is an
    environment variable."""

    flag: str
    reason: str
    takes_value: bool = True
    is_read: bool = True


def _elsewhere(reason: str, *flags: str, takes_value: bool = True) -> tuple[IgnoredFlag, ...]:
    """Flags that vLLM or LoRAX has and TGI has not; as variables their names would be anybody's."""
    return tuple(IgnoredFlag(flag, reason, takes_value, is_read=False) for flag in flags)


_NO_TUNNEL = "this server opens no tunnels"
_SCHEDULING = "prompts are computed in chunks beside running requests, which never pause for them"
_GRAPHS = "on a GPU steps have graphs for sizes of our choice; on a CPU there are none"
_SPECULATION = "tokens are not speculated"
_LOG = "the log has a line a request and never prompts; --log-level warn leaves it out"

IGNORED = (
    IgnoredFlag("--speculate", _SPECULATION),
    IgnoredFlag("--kv-cache-dtype", "the KV cache has the type of the computation (--dtype)"),
    IgnoredFlag("--trust-remote-code", "code that comes with a model is never run", takes_value=False),
    IgnoredFlag("--waiting-served-ratio", _SCHEDULING),
    IgnoredFlag("--max-waiting-tokens", _SCHEDULING),
    IgnoredFlag("--cuda-graphs", _GRAPHS),
    IgnoredFlag("--prometheus-port", "metrics are served under /metrics of the port itself"),
    IgnoredFlag("--shard-uds-path", "sockets lie in a private temporary folder"),
    IgnoredFlag("--disable-custom-kernels", "the CPU path has no kernels to switch off", takes_value=False),
    IgnoredFlag("--ngrok", _NO_TUNNEL, takes_value=False),
    IgnoredFlag("--ngrok-authtoken", _NO_TUNNEL),
    IgnoredFlag("--ngrok-edge", _NO_TUNNEL),
    IgnoredFlag("--usage-stats", "usage is never reported to anybody"),
    IgnoredFlag("--disable-usage-stats", "usage is never reported to anybody", takes_value=False),
    IgnoredFlag("--disable-crash-reports", "crashes are never reported to anybody", takes_value=False),
    IgnoredFlag("--max-image-fetch-size", "images are not served"),
    IgnoredFlag("--enable-auto-tool-choice", "tools are always served", takes_value=False),
    IgnoredFlag("--enable-lora", "LoRA adapters are always served", takes_value=False),
    IgnoredFlag("--max-cpu-loras", "host memory for adapters is bounded in bytes (--adapter-host-memory)"),
    *_elsewhere(_GRAPHS, "--enforce-eager", "--eager", "--compile", takes_value=False),
    *_elsewhere(_GRAPHS, "--compile-max-batch-size", "--compile-batch-size", "--compile-max-rank"),
    *_elsewhere(_GRAPHS, "--max-seq-len-to-capture"),
    *_elsewhere(_SCHEDULING, "--enable-chunked-prefill", takes_value=False),
    *_elsewhere(_SCHEDULING, "--chunked-prefill", "--eager-prefill"),
    *_elsewhere(_SPECULATION, "--speculative-tokens", "--speculation-max-batch-size"),
    *_elsewhere(_LOG, "--disable-log-requests", "--disable-uvicorn-access-log", takes_value=False),
    *_elsewhere(_LOG, "--uvicorn-log-level", "--max-log-len"),
    *_elsewhere("metrics are always served", "--disable-log-stats", takes_value=False),
    *_elsewhere("always told", "--enable-prompt-tokens-details", "--enable-request-id-headers",
                "--enable-server-load-tracking", takes_value=False),
    *_elsewhere("KV blocks are not swapped: a sequence that gives way is computed again", "--swap-space"),
    *_elsewhere("a request's own `seed` makes its draws repeatable", "--seed"),
    *_elsewhere("the files tell their format", "--load-format", "--config-format", "--tokenizer-mode"),
    *_elsewhere("ranks are processes of this launcher", "--distributed-executor-backend"),
    *_elsewhere("20 at each place", "--max-logprobs"),
    *_elsewhere("there is one compiler of grammars", "--guided-decoding-backend"),
    *_elsewhere("adapters are computed in the type of the model", "--lora-dtype"),
    *_elsewhere("the model's layout decides how an adapter is split between ranks", "--fully-sharded-loras",
                takes_value=False),
    *_elsewhere("waiting requests take turns between adapters (--fairness-key)", "--adapter-cycle-time-s"),
    *_elsewhere("--cuda-memory-fraction and --kv-memory-fraction bound the memory", "--memory-wiggle-room"),
    *_elsewhere("a folder is read where it is, any other name is the hub's", "--source"),
    *_elsewhere("the kernels are those of the device", "--backend"),
    *_elsewhere("the kernels are those of the device", "--disable-sgmv", takes_value=False),
)  # fmt: skip

# Settings of ours that nothing reads yet, with the reason; giving one is answered like a flag without effect.
NOT_YET: dict[str, str] = {
    "otlp_endpoint": "traces are not exported yet",
    "otlp_service_name": "traces are not exported yet",
}


LIST_FLAGS = ("--lora-modules", "--lora-paths")
# vLLM's names of an adapter's name and files in a module that is an object, and SGLang's.
_NAME_KEYS, _PATH_KEYS = ("name", "lora_name"), ("path", "lora_path")


def spread_lora_modules(args: list[str]) -> list[str]:
    """vLLM's `--lora-modules a=x {"name": "b", "path": "y"}` and SGLang's `--lora-paths` as one flag an adapter, each
    as NAME=PATH; every other argument stays as it is."""
    result: list[str] = []
    list_flag: str | None = None
    for arg in args:
        flag, equals, value = arg.partition("=")
        if arg in LIST_FLAGS:
            list_flag = arg
        elif flag in LIST_FLAGS and equals:
            list_flag = flag
            result += [flag, _module(value)]
        elif arg.startswith("-") or list_flag is None:
            list_flag = None
            result.append(arg)
        else:
            result += [list_flag, _module(arg)]
    return result


def _module(text: str) -> str:
    """NAME=PATH of a module that is a JSON object; anything else as it is."""
    try:
        found = json.loads(text) if text.startswith("{") else None
    except ValueError:
        return text
    if not isinstance(found, dict):
        return text
    name = next((found[key] for key in _NAME_KEYS if key in found), None)
    path = next((found[key] for key in _PATH_KEYS if key in found), None)
    return f"{name}={path}" if name and path else text
