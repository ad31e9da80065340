"""The arguments of `LLM`, in vLLM's names or ours, as settings."""

import difflib
import warnings
from typing import Any

from loraplex.flags import SettingField, Settings, hub_environment, setting_fields
from loraplex_server.config import AdapterConfig, ApiConfig, EngineConfig, LaunchConfig, ServeConfig

# vLLM's name → our setting.
SAME_MEANING = {
    "max_loras": "max_resident_adapters",
    "tensor_parallel_size": "num_shard",
    "max_num_seqs": "max_batch_size",
    "max_num_batched_tokens": "max_batch_prefill_tokens",
    "max_model_len": "max_total_tokens",
    "quantization": "quantize",
    "enable_prefix_caching": "prefix_caching",
    "download_dir": "huggingface_hub_cache",
    "hf_token": "hub_token",
}
DTYPE_NAMES = {"half": "float16", "float": "float32"}

_ONE_CPU = "the model runs on the CPU"
_TEXT_ONLY = "text is all that is served"
_NO_CODE = "code that comes with a model is never run"
# vLLM's arguments that change nothing here, with the reason.
NO_MEANING = {
    "allowed_local_media_path": _TEXT_ONLY,
    "async_scheduling": "steps overlap on a GPU by themselves (overlap_steps)",
    "code_revision": _NO_CODE,
    "compilation_config": "models are not compiled",
    "cpu_offload_gb": _ONE_CPU,
    "disable_custom_all_reduce": _ONE_CPU,
    "disable_log_stats": "nothing is logged about steps",
    "distributed_executor_backend": "ranks are processes of this machine",
    "enable_chunked_prefill": "prompts are always computed in chunks",
    "enforce_eager": "there are no CUDA graphs to leave out",
    "fully_sharded_loras": "adapters are cut with the linears, whose sums they share",
    "gpu_memory_utilization": "the model runs on the CPU; kv_memory_fraction shares out its memory",
    "kv_cache_dtype": "the KV cache has the type of the computation",
    "limit_mm_per_prompt": _TEXT_ONLY,
    "load_format": "safetensors are read, whatever this says",
    "lora_dtype": "adapters are computed in the model's type",
    "max_cpu_loras": "host memory for adapters is bounded in bytes (adapter_host_memory)",
    "max_seq_len_to_capture": "there are no CUDA graphs",
    "mm_processor_kwargs": _TEXT_ONLY,
    "served_model_name": "nothing is served by name",
    "speculative_config": "tokens are not speculated",
    "swap_space": "sequences that give way are computed again, not swapped out",
    "tokenizer_mode": "the fast tokenizer is the only one",
    "tokenizer_revision": "the tokenizer is a local folder",
    "trust_remote_code": _NO_CODE,
    "use_tqdm_on_load": "loading shows no bar",
    "worker_cls": _ONE_CPU,
}
# vLLM's arguments that must keep the values that mean «nothing special».
ONLY_VALUES: dict[str, tuple[Any, ...]] = {
    "pipeline_parallel_size": (1,),
    "data_parallel_size": (1,),
    "runner": ("auto", "generate"),
    "task": ("auto", "generate"),
    "hf_overrides": (None, {}),
    "skip_tokenizer_init": (False,),
    "rope_theta": (None,),
}
_GROUPS = (EngineConfig, AdapterConfig)
_LAUNCH_NAMES = ("revision", "huggingface_hub_cache", "hub_token")


def read_arguments(model: str, named: dict[str, Any], own_names: tuple[str, ...]) -> Settings:
    """The settings that `LLM(model, **named)` asks for; None is the same as leaving an argument out.

    One warning names the arguments without a meaning here. Raises TypeError for an unknown name, ValueError for a
    value out of bounds. `own_names`: further arguments of `LLM`, for the hint at a near name.
    """
    fields = {field.name: field for group in _GROUPS for field in setting_fields(group)}
    fields |= {field.name: field for field in setting_fields(LaunchConfig) if field.name == "num_shard"}
    known = {*fields, *SAME_MEANING, *_LAUNCH_NAMES, *NO_MEANING, *ONLY_VALUES, *own_names}
    values: dict[str, Any] = {}
    ignored: list[str] = []
    for name, value in named.items():
        if name not in known:
            near = difflib.get_close_matches(name, sorted(known), n=1)
            hint = f"; did you mean '{near[0]}'?" if near else ""
            raise TypeError(f"LLM() has no argument '{name}'{hint}")
        if name in ONLY_VALUES:
            if value not in ONLY_VALUES[name]:
                raise ValueError(f"{name}={value!r} is not served: leave it out")
        elif name in NO_MEANING:
            if value not in (None, False):
                ignored.append(f"{name} ({NO_MEANING[name]})")
        elif value is not None:
            setting = SAME_MEANING.get(name, name)
            values[setting] = _checked(name, fields[setting], value) if setting in fields else value
    if ignored:
        warnings.warn(f"arguments without effect: {', '.join(ignored)}", stacklevel=3)
    return _settings(model, values)


def _settings(model: str, values: dict[str, Any]) -> Settings:
    def build(group: type) -> dict[str, Any]:
        return {field.name: values[field.name] for field in setting_fields(group) if field.name in values}

    hub = hub_environment(values.get("huggingface_hub_cache"))
    token = values.get("hub_token")
    if token is not None:
        hub["hub_token"] = token
    num_shard = values.get("num_shard", 1)
    launch = LaunchConfig(model_id=model, revision=values.get("revision"), num_shard=num_shard, **hub)
    engine = EngineConfig(**build(EngineConfig), adapters=AdapterConfig(**build(AdapterConfig)))
    return Settings(launch=launch, serve=ServeConfig(api=ApiConfig(), engine=engine))


def _checked(name: str, field: SettingField, given: Any) -> Any:
    value: Any = given
    if field.name == "dtype":
        value = str(value).removeprefix("torch.")
        value = DTYPE_NAMES.get(value, value)
    kinds = (int, float) if field.kind is float else (field.kind,)
    if type(value) not in kinds:
        raise ValueError(f"{name} must be of type {field.kind.__name__}. Given: {value!r}")
    if field.choices and value not in field.choices:
        raise ValueError(f"{name} must be one of {', '.join(field.choices)}. Given: {value!r}")
    if field.minimum is not None and value < field.minimum:
        raise ValueError(f"{name} must be at least {field.minimum}. Given: {value}")
    return value
