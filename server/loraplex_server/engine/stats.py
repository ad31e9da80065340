"""Counts and times of the steps since the last report, for metrics and the log."""

from collections import Counter
from collections.abc import Iterable

from loraplex_server.engine.adapters.manager import AdapterManager
from loraplex_server.engine.block_manager import BlockManager
from loraplex_server.engine.scheduler import Scheduler
from loraplex_server.engine.sequence import Sequence
from loraplex_server.engine.step import StepPlan
from loraplex_server.engine.worker import StepResult
from loraplex_server.messages import EngineStats


class StatsCollector:
    """Counts steps; `report` gives what was counted and starts anew."""

    def __init__(self) -> None:
        self._reset()

    def _reset(self) -> None:
        self._prefill_step_s: list[float] = []
        self._decode_step_s: list[float] = []
        self._forward_s: list[float] = []
        self._sample_s: list[float] = []
        self._num_prompt_tokens = 0
        self._num_generated_tokens = 0
        self._num_cached_tokens = 0
        self._num_preemptions = 0
        self._adapter_wait_s: list[float] = []

    def count_step(self, plan: StepPlan, result: StepResult, step_s: float, num_generated: int) -> None:
        """Take in one step that computed tokens, and gave sequences so many."""
        is_decode = plan.num_decodes == len(plan.sequences)
        (self._decode_step_s if is_decode else self._prefill_step_s).append(step_s)
        self._forward_s.append(result.forward_s)
        self._sample_s.append(result.sample_s)
        self._num_generated_tokens += num_generated

    def count_start(self, sequence: Sequence) -> None:
        """Take in a sequence that gave its first token; what is computed again after a preemption counts once."""
        self._num_prompt_tokens += sequence.num_prompt_tokens
        self._num_cached_tokens += sequence.num_cached_tokens
        if sequence.is_cold:
            self._adapter_wait_s.append(max((sequence.first_run_time or 0.0) - sequence.request.arrival_time, 0.0))

    def report(self, scheduler: Scheduler, blocks: BlockManager, adapters: AdapterManager) -> EngineStats:
        """Gauges of now and the counts since the last report."""
        preemptions = scheduler.num_preemptions - self._num_preemptions
        loading = [s for s in scheduler.waiting if _waits_for_adapter(s, adapters)]
        resident_ids = adapters.resident_ids()
        loads = adapters.take_counts()
        stats = EngineStats(
            num_running=len(scheduler.running),
            num_waiting=len(scheduler.waiting),
            num_waiting_for_adapter=len(loading),
            num_kv_blocks=blocks.num_blocks,
            num_kv_blocks_used=blocks.num_used,
            num_running_tokens=sum(len(s.token_ids) for s in scheduler.running),
            num_adapters_registered=adapters.num_registered,
            num_adapters_in_host=len(adapters.host),
            num_adapters_resident=len(resident_ids),
            adapter_host_bytes=adapters.host.used_bytes,
            adapter_device_bytes=adapters.device.used_bytes,
            num_adapter_pins=adapters.num_pins,
            num_host_loads=loads.host_loads,
            num_device_loads=loads.device_loads,
            num_host_evictions=loads.host_evictions,
            num_device_evictions=loads.device_evictions,
            num_failed_loads=loads.failed_loads,
            host_load_s=loads.host_load_s,
            device_load_s=loads.device_load_s,
            adapter_wait_s=self._adapter_wait_s,
            resident_adapter_ids=resident_ids,
            running_adapters=_adapter_counts(scheduler.running),
            waiting_adapters=_adapter_counts(scheduler.waiting),
            num_preemptions=preemptions,
            num_prompt_tokens=self._num_prompt_tokens,
            num_cached_tokens=self._num_cached_tokens,
            num_generated_tokens=self._num_generated_tokens,
            prefill_step_s=self._prefill_step_s,
            decode_step_s=self._decode_step_s,
            forward_s=self._forward_s,
            sample_s=self._sample_s,
        )
        self._reset()
        self._num_preemptions = scheduler.num_preemptions
        return stats


def _waits_for_adapter(sequence: Sequence, adapters: AdapterManager) -> bool:
    digest = sequence.request.adapter_digest
    return digest is not None and not adapters.is_ready(digest)


def _adapter_counts(sequences: Iterable[Sequence]) -> dict[str, int]:
    return dict(Counter(s.request.adapter_id for s in sequences if s.request.adapter_id))
