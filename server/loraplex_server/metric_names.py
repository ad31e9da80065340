"""Series under the names that dashboards of LoRAX and vLLM ask for, beside TGI's names and ours."""

_LORAX_TOO = (
    "request_count", "request_success", "request_failure", "request_duration", "request_queue_duration",
    "request_validation_duration", "request_inference_duration", "request_mean_time_per_token_duration",
    "request_input_length", "request_max_new_tokens", "request_generated_tokens", "request_skipped_tokens",
    "batch_inference_count", "batch_inference_success", "batch_inference_duration", "batch_current_size",
    "batch_current_max_tokens",
)  # fmt: skip
_LORAX = {f"tgi_{name}": f"lorax_{name}" for name in _LORAX_TOO} | {"tgi_queue_size": "lorax_queue_length"}
# vLLM's have a label with the model's name, by which its dashboards choose.
_VLLM = {
    "tgi_request_success": ("vllm:request_success_total",),
    "tgi_request_duration": ("vllm:e2e_request_latency_seconds",),
    "tgi_request_queue_duration": ("vllm:request_queue_time_seconds",),
    "tgi_request_inference_duration": ("vllm:request_inference_time_seconds",),
    "tgi_request_mean_time_per_token_duration": ("vllm:request_time_per_output_token_seconds",),
    "tgi_request_input_length": ("vllm:request_prompt_tokens",),
    "tgi_request_generated_tokens": ("vllm:request_generation_tokens",),
    "tgi_request_max_new_tokens": ("vllm:request_params_max_tokens",),
    "loraplex_time_to_first_token": ("vllm:time_to_first_token_seconds",),
    "loraplex_prompt_tokens": ("vllm:prompt_tokens_total", "vllm:prefix_cache_queries_total"),
    "loraplex_prefix_hit_tokens": ("vllm:prefix_cache_hits_total",),
    "loraplex_generated_tokens": ("vllm:generation_tokens_total",),
    "loraplex_preemptions": ("vllm:num_preemptions_total",),
}


def under_other_names(text: str, model_label: str) -> str:
    """The lines of those series of a text in Prometheus' format that have other names, under these names.

    `model_label` is the label `model_name="…"`, which vLLM's names get.
    """
    found: dict[str, list[str]] = {}
    family = ""
    for line in text.splitlines():
        is_about = line.startswith("# ")
        if is_about:
            family = line.split(" ", 3)[2]
        rest = line.partition(family)[2]
        if family in _LORAX:
            found.setdefault(_LORAX[family], []).append(_line(line, _LORAX[family], rest, is_about))
        for name in _VLLM.get(family, ()):
            labelled = rest if is_about else _labelled(rest, model_label)
            found.setdefault(name, []).append(_line(line, name, labelled, is_about))
    return "".join(f"{line}\n" for lines in found.values() for line in lines)


def _line(line: str, name: str, rest: str, is_about: bool) -> str:
    """A sample, or a line of HELP or TYPE, of another name."""
    return f"{line[:7]}{name}{rest}" if is_about else name + rest


def _labelled(rest: str, label: str) -> str:
    """What stands behind the name of a sample, with one more label in front of the others."""
    suffix, brace, others = rest.partition("{")
    if brace:
        return f"{suffix}{{{label},{others}"
    suffix, _, value = rest.partition(" ")
    return f"{suffix}{{{label}}} {value}"
