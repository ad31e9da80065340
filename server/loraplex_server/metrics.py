"""Prometheus metrics of the API process, all named and described here; TGI's names, and ours for what TGI lacks."""

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Gauge, Histogram, Summary, disable_created_metrics
from prometheus_client.exposition import generate_latest

from loraplex_server.errors import GenerationFailed, IncompleteGeneration, LoraplexError, Overloaded
from loraplex_server.messages import EngineReady, EngineStats
from loraplex_server.metric_names import under_other_names
from loraplex_server.vllm_metrics import escaped_label, render_vllm_metrics

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
MAX_ADAPTER_LABELS = 200
OTHER_ADAPTERS = "other"

DURATION_BUCKETS = tuple(0.0001 * 1.5**k for k in range(35))
COUNTERS = {
    "tgi_request_count": "requests received",
    "tgi_request_success": "requests finished",
    "tgi_request_failure": "requests failed, by cause",
    "tgi_batch_inference_count": "engine steps: prefill is a step that held prompt tokens",
    "tgi_batch_inference_success": "engine steps that ended well",
    "loraplex_adapter_requests": f"requests by adapter; beyond {MAX_ADAPTER_LABELS} names they count as other",
    "loraplex_preemptions": "sequences that gave back their KV blocks to let others run",
    "loraplex_prompt_tokens": "prompt tokens of the sequences that started",
    "loraplex_prefix_hit_tokens": "prompt tokens found in the prefix cache",
    "loraplex_generated_tokens": "tokens generated",
    "loraplex_adapter_loads": "adapters brought into a tier",
    "loraplex_adapter_evictions": "adapters that left a tier",
    "loraplex_adapter_load_failures": "adapters that could not be brought into a tier",
    "loraplex_engine_restarts": "times that the engine was lost and started again",
}
LABELLED = {
    "tgi_request_failure",
    "tgi_batch_inference_count",
    "tgi_batch_inference_success",
    "loraplex_adapter_requests",
    "loraplex_adapter_loads",
    "loraplex_adapter_evictions",
}
JOB_DURATIONS = {
    "tgi_request_duration": "seconds for a whole request",
    "tgi_request_validation_duration": "seconds to tokenise and check a request",
    "tgi_request_queue_duration": "seconds a request waited for its first step",
    "tgi_request_inference_duration": "seconds from a request's first step to its end",
    "tgi_request_mean_time_per_token_duration": "seconds of inference for each generated token of a request",
    "loraplex_time_to_first_token": "seconds from a request's arrival to its first token",
    "loraplex_adapter_wait": "seconds from arrival to first step of a request whose adapter was not on the device",
}
STEP_DURATIONS = {
    "tgi_batch_inference_duration": "seconds of an engine step",
    "tgi_batch_forward_duration": "seconds of the model's forward pass in a step",
    "tgi_batch_decode_duration": "seconds of choosing tokens in a step",
}
GAUGES = {
    "tgi_batch_current_size": "sequences running",
    "tgi_batch_current_max_tokens": "tokens that the running sequences hold in the KV cache",
    "tgi_batch_max_total_tokens": "tokens that fit in the KV cache",
    "tgi_queue_size": "requests waiting",
    "loraplex_running": "sequences running",
    "loraplex_waiting": "requests waiting in the engine",
    "loraplex_waiting_for_adapter": "requests waiting for their adapter to be loaded",
    "loraplex_kv_blocks": "KV blocks",
    "loraplex_kv_blocks_used": "KV blocks held by sequences",
    "loraplex_adapter_pins": "sequences that hold an adapter on the device",
    "loraplex_adapters_resident": "adapters on the device",
    "loraplex_adapters_in_host": "adapters in host memory",
    "loraplex_adapters_registered": "adapters whose files the engine knows",
    "loraplex_adapter_host_bytes": "host memory that adapters take",
    "loraplex_adapter_host_budget_bytes": "host memory that adapters may take",
    "loraplex_adapter_device_bytes": "device memory that adapters take, in whole pages of their own ranks",
    "loraplex_adapter_device_budget_bytes": "device memory that adapters may take",
}
# Gauges that are fields of EngineStats.
STATS_GAUGES = {
    "tgi_batch_current_size": "num_running",
    "loraplex_running": "num_running",
    "tgi_queue_size": "num_waiting",
    "loraplex_waiting": "num_waiting",
    "tgi_batch_current_max_tokens": "num_running_tokens",
    "loraplex_waiting_for_adapter": "num_waiting_for_adapter",
    "loraplex_kv_blocks_used": "num_kv_blocks_used",
    "loraplex_adapter_pins": "num_adapter_pins",
    "loraplex_adapters_resident": "num_adapters_resident",
    "loraplex_adapters_in_host": "num_adapters_in_host",
    "loraplex_adapters_registered": "num_adapters_registered",
    "loraplex_adapter_host_bytes": "adapter_host_bytes",
    "loraplex_adapter_device_bytes": "adapter_device_bytes",
}


@dataclass(slots=True, kw_only=True)
class Timings:
    """Where a job's time went, in seconds."""

    validation_s: float = 0.0
    queue_s: float = 0.0
    inference_s: float = 0.0
    first_token_s: float = 0.0
    total_s: float = 0.0


class _Counters:
    """Counters without the `_total` that prometheus_client would add: TGI's dashboards ask for the bare names."""

    def __init__(self) -> None:
        # A series is named by its label, (name, value); those without a label are there from the start.
        self._series: dict[str, dict[tuple[str, str] | None, int]] = {
            name: {} if name in LABELLED else {None: 0} for name in COUNTERS
        }

    def add(self, name: str, amount: int = 1, label: tuple[str, str] | None = None) -> None:
        series = self._series[name]
        series[label] = series.get(label, 0) + amount

    def add_bounded(self, name: str, label: str, value: str) -> None:
        """Add one; a value that comes after `MAX_ADAPTER_LABELS` others counts as «other»."""
        series = self._series[name]
        is_new = (label, value) not in series
        self.add(name, label=(label, OTHER_ADAPTERS if is_new and len(series) >= MAX_ADAPTER_LABELS else value))

    def render(self) -> str:
        lines = []
        for name, series in self._series.items():
            lines += [f"# HELP {name} {COUNTERS[name]}", f"# TYPE {name} counter"]
            lines += [f"{name}{_label_text(label)} {value}" for label, value in series.items()]
        return "\n".join(lines) + "\n"


def _label_text(label: tuple[str, str] | None) -> str:
    if label is None:
        return ""
    return f'{{{label[0]}="{escaped_label(label[1])}"}}'


class JobMetrics:
    """What is learnt about one job while it runs."""

    def __init__(self, metrics: "Metrics"):
        self._metrics = metrics
        self.is_finished = False

    def admitted(self, adapter_id: str | None, max_new_tokens: int) -> None:
        """The job passed its checks. Its adapter is known: unknown names never become labels."""
        self._metrics.observe_admission(adapter_id, max_new_tokens)

    def finished(self, lengths: list[tuple[int, int]], timings: Timings) -> None:
        """All sequences of the job ended well; `lengths` has the prompt and the generated tokens of each."""
        self.is_finished = True
        self._metrics.observe_end(lengths, timings)


class Metrics:
    """Every series of this process, and the latest of the engine's."""

    def __init__(self, model_name: str = "") -> None:
        self._model_label = f'model_name="{escaped_label(model_name)}"'
        disable_created_metrics()  # type: ignore[no-untyped-call]  # the library's, without a signature
        self._registry = CollectorRegistry()
        self._counters = _Counters()
        self._durations = {
            name: Histogram(name, text, buckets=DURATION_BUCKETS, registry=self._registry)
            for name, text in JOB_DURATIONS.items()
        }
        self._step_durations = {
            name: Histogram(name, text, ["method"], buckets=DURATION_BUCKETS, registry=self._registry)
            for name, text in STEP_DURATIONS.items()
        }
        self._gauges = {name: Gauge(name, text, registry=self._registry) for name, text in GAUGES.items()}
        self._load_durations = Histogram(
            "loraplex_adapter_load_duration",
            "seconds to bring an adapter into a tier",
            ["tier"],
            buckets=DURATION_BUCKETS,
            registry=self._registry,
        )
        self._lengths: dict[str, Histogram] = {}
        self._limits: EngineReady | None = None
        self._latest = EngineStats()
        self._skipped_tokens = Summary(
            "tgi_request_skipped_tokens", "speculated tokens accepted; none are speculated", registry=self._registry
        )

    def set_limits(self, limits: EngineReady) -> None:
        """Take over what depends on the engine's limits; the histograms keep the buckets of the first engine."""
        for name, text, top in (
            ("tgi_request_input_length", "prompt tokens of a request", limits.max_input_tokens),
            ("tgi_request_max_new_tokens", "tokens that a request may generate", limits.max_total_tokens),
            ("tgi_request_generated_tokens", "tokens that a request generated", limits.max_total_tokens),
        ):
            if name not in self._lengths:
                buckets = [top * (i + 1) / 100 for i in range(100)]
                self._lengths[name] = Histogram(name, text, buckets=buckets, registry=self._registry)
        self._gauges["tgi_batch_max_total_tokens"].set(limits.max_batch_total_tokens)
        self._gauges["loraplex_kv_blocks"].set(limits.num_kv_blocks)
        self._gauges["loraplex_adapter_host_budget_bytes"].set(limits.adapter_host_budget_bytes)
        self._gauges["loraplex_adapter_device_budget_bytes"].set(limits.adapter_device_budget_bytes)
        self._limits = limits

    @contextmanager
    def job(self) -> Iterator[JobMetrics]:
        """Count one job from here to the end of the block, with the way it ended."""
        self._counters.add("tgi_request_count")
        measured = JobMetrics(self)
        try:
            yield measured
        except LoraplexError as error:
            self._count_failure(_failure_label(error))
            raise
        except (asyncio.CancelledError, GeneratorExit):
            if not measured.is_finished:
                self._count_failure("dropped")
            raise

    def observe_admission(self, adapter_id: str | None, max_new_tokens: int) -> None:
        """Record a job that passed its checks."""
        if adapter_id is not None:
            self._counters.add_bounded("loraplex_adapter_requests", "adapter_id", adapter_id)
        self._lengths["tgi_request_max_new_tokens"].observe(max_new_tokens)

    def observe_end(self, lengths: list[tuple[int, int]], timings: Timings) -> None:
        """Record a job that ended well."""
        self._counters.add("tgi_request_success")
        durations = self._durations
        durations["tgi_request_duration"].observe(timings.total_s)
        durations["tgi_request_validation_duration"].observe(timings.validation_s)
        durations["tgi_request_queue_duration"].observe(timings.queue_s)
        durations["tgi_request_inference_duration"].observe(timings.inference_s)
        durations["loraplex_time_to_first_token"].observe(timings.first_token_s)
        for num_prompt_tokens, num_generated_tokens in lengths:
            self._lengths["tgi_request_input_length"].observe(num_prompt_tokens)
            self._lengths["tgi_request_generated_tokens"].observe(num_generated_tokens)
            durations["tgi_request_mean_time_per_token_duration"].observe(
                timings.inference_s / max(num_generated_tokens, 1)
            )
            self._skipped_tokens.observe(0)

    def observe_stats(self, stats: EngineStats) -> None:
        """Take over the engine's gauges and add what it counted."""
        self._latest = stats
        for name, field in STATS_GAUGES.items():
            self._gauges[name].set(getattr(stats, field))
        for tier, loads, evictions, seconds in (
            ("host", stats.num_host_loads, stats.num_host_evictions, stats.host_load_s),
            ("device", stats.num_device_loads, stats.num_device_evictions, stats.device_load_s),
        ):
            self._counters.add("loraplex_adapter_loads", loads, ("tier", tier))
            self._counters.add("loraplex_adapter_evictions", evictions, ("tier", tier))
            for value in seconds:
                self._load_durations.labels(tier).observe(value)
        self._counters.add("loraplex_adapter_load_failures", stats.num_failed_loads)
        for value in stats.adapter_wait_s:
            self._durations["loraplex_adapter_wait"].observe(value)
        self._counters.add("loraplex_preemptions", stats.num_preemptions)
        self._counters.add("loraplex_prompt_tokens", stats.num_prompt_tokens)
        self._counters.add("loraplex_prefix_hit_tokens", stats.num_cached_tokens)
        self._counters.add("loraplex_generated_tokens", stats.num_generated_tokens)
        for method, seconds in (("prefill", stats.prefill_step_s), ("decode", stats.decode_step_s)):
            if seconds:
                self._counters.add("tgi_batch_inference_count", len(seconds), ("method", method))
                self._counters.add("tgi_batch_inference_success", len(seconds), ("method", method))
                self._observe_steps("tgi_batch_inference_duration", method, seconds)
        # The engine does not split these two by kind of step.
        self._observe_steps("tgi_batch_forward_duration", "all", stats.forward_s)
        self._observe_steps("tgi_batch_decode_duration", "all", stats.sample_s)

    def engine_lost(self) -> None:
        """Nothing runs until another engine has started."""
        self.observe_stats(EngineStats())
        self._counters.add("loraplex_engine_restarts")

    def render(self) -> bytes:
        """All series in Prometheus' text format."""
        text = generate_latest(self._registry).decode() + self._counters.render()
        text += under_other_names(text, self._model_label)
        if self._limits is not None:
            text += render_vllm_metrics(self._latest, self._limits, time.time(), self._model_label)
        return text.encode()

    def _observe_steps(self, name: str, method: str, seconds: list[float]) -> None:
        if seconds:
            histogram = self._step_durations[name].labels(method)
            for value in seconds:
                histogram.observe(value)

    def _count_failure(self, cause: str) -> None:
        self._counters.add("tgi_request_failure", label=("err", cause))


def _failure_label(error: LoraplexError) -> str:
    match error:
        case Overloaded():
            return "overloaded"
        case GenerationFailed():
            return "generation"
        case IncompleteGeneration():
            return "incomplete"
        case _:
            return "adapter" if error.error_type.startswith("adapter_") else "validation"
