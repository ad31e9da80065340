"""The series that LoRA-aware routers read, under vLLM's names: queue, KV use, and which adapters are where.

The names and labels are those of the Gateway API inference extension's model server protocol. Adapter names in labels
are bounded; beyond the bound they are left out.
"""

from collections.abc import Iterable

from loraplex_server.messages import EngineReady, EngineStats

MAX_NAMES = 200


def escaped_label(value: str) -> str:
    """A label's value as the text format wants it."""
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


def render_vllm_metrics(stats: EngineStats, limits: EngineReady, now: float, model: str) -> str:
    """The lines of all series; `now` is unix time, the value that tells readers which info is the latest.

    `model` is the label with the model's name, by which vLLM's dashboards choose.
    """
    used = stats.num_kv_blocks_used / max(limits.num_kv_blocks, 1)
    running, waiting = _joined(stats.running_adapters), _joined(stats.waiting_adapters)
    lines = [
        *_gauge("vllm:num_requests_running", "sequences running", model, stats.num_running),
        *_gauge("vllm:num_requests_waiting", "requests waiting", model, stats.num_waiting),
        *_gauge("vllm:kv_cache_usage_perc", "share of the KV blocks in use, 0 to 1", model, used),
        *_gauge(
            "vllm:cache_config_info",
            "the KV cache",
            f'block_size="{limits.block_size}",num_gpu_blocks="{limits.num_kv_blocks}"',
            1,
        ),
        *_gauge(
            "vllm:lora_requests_info",
            "adapters of running and of waiting requests; the value is the time",
            f'max_lora="{limits.max_loras}",running_lora_adapters="{running}",waiting_lora_adapters="{waiting}"',
            now,
        ),
        *_gauge("vllm:num_gpu_loaded_lora_adapters", "adapters on the device", "", stats.num_adapters_resident),
        *_gauge("vllm:num_cpu_loaded_lora_adapters", "adapters in host memory", "", stats.num_adapters_in_host),
        "# HELP vllm:lora_adapter_loaded adapters on the device, one series each",
        "# TYPE vllm:lora_adapter_loaded gauge",
    ]
    lines += [
        f'vllm:lora_adapter_loaded{{adapter_name="{escaped_label(name)}",level="gpu"}} 1'
        for name in sorted(stats.resident_adapter_ids)[:MAX_NAMES]
    ]
    return "\n".join(lines) + "\n"


def _joined(names: Iterable[str]) -> str:
    return escaped_label(",".join(sorted(names)[:MAX_NAMES]))


def _gauge(name: str, text: str, labels: str, value: float) -> list[str]:
    series = f"{name}{{{labels}}}" if labels else name
    return [f"# HELP {name} {text}", f"# TYPE {name} gauge", f"{series} {value}"]
