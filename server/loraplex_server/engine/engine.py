"""The engine: requests in, tokens out, a step at a time. It knows no sockets and no model, only plans and results."""

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from loraplex_server.config import EngineConfig
from loraplex_server.engine.adapters.manager import AdapterManager
from loraplex_server.engine.block_manager import BlockManager
from loraplex_server.engine.executor import Executor
from loraplex_server.engine.guided import GrammarLibrary
from loraplex_server.engine.memory import settle_adapter_budgets
from loraplex_server.engine.row_results import RowResult
from loraplex_server.engine.scheduler import Progress, Scheduler
from loraplex_server.engine.sequence import Sequence, new_sequence
from loraplex_server.engine.stats import StatsCollector
from loraplex_server.engine.step import StepPlan
from loraplex_server.engine.worker import StepResult
from loraplex_server.messages import AdapterSpec, GenerateRequest, StepOutput, TokenOutput

# Gauges need not be newer than this; a report costs some microseconds a sequence.
STATS_INTERVAL_S = 0.05


@dataclass(frozen=True, slots=True)
class _Flight:
    """A step that was launched and not read yet."""

    plan: StepPlan
    began: float


class Engine:
    """Scheduler, adapters and ranks of one base model.

    With `runs_ahead` a step is planned and launched before the tokens of the one before are read: on a GPU the host
    works while the device does. Otherwise each step is read before the next is planned.
    """

    def __init__(
        self,
        config: EngineConfig,
        executor: Executor,
        *,
        num_kv_blocks: int,
        end_token_ids: frozenset[int],
        grammars: GrammarLibrary | None = None,
        device_bytes_of: Callable[[AdapterSpec], int] = lambda spec: spec.num_bytes,
        runs_ahead: bool = False,
    ):
        self.blocks = BlockManager(num_kv_blocks, config.block_size, prefix_caching=config.prefix_caching)
        budgets = settle_adapter_budgets(config.adapters, config.device)
        self.adapters = AdapterManager(
            config.adapters.max_resident_adapters,
            host_budget_bytes=budgets.host_bytes,
            device_budget_bytes=budgets.device_bytes,
            device_bytes_of=device_bytes_of,
        )
        self.scheduler = Scheduler(
            self.blocks,
            self.adapters,
            max_batch_size=config.max_batch_size,
            max_prefill_tokens=config.prefill_tokens,
            end_token_ids=end_token_ids,
            starvation_bound_s=config.starvation_bound_s,
        )
        self._executor = executor
        self._num_ahead = int(runs_ahead)  # steps left in flight when `step` returns
        self._in_flight: deque[_Flight] = deque()
        self.is_idle = False  # the last step found nothing to do: neither a plan nor a step in flight
        self._read_at = 0.0  # when a step was read last; time.perf_counter
        self._grammars = grammars
        self._sequences: dict[str, Sequence] = {}
        self._compiling: list[Sequence] = []  # in none of the scheduler's lists until their grammar is compiled
        self._num_arrived = 0
        self._refused: list[TokenOutput] = []
        self._stats = StatsCollector()
        self._stats_due = 0.0
        self._has_news = True  # something has changed since the last report

    @property
    def has_work(self) -> bool:
        """Whether a step could do something, now or when an adapter has arrived."""
        adapters = self.adapters
        return bool(self._sequences or self._refused or self._in_flight or adapters.has_ops or adapters.num_loading)

    def add(self, request: GenerateRequest) -> None:
        """Take in a request; a reason why it cannot run comes with the next step's output."""
        sequence = new_sequence(request, self._num_arrived, self.adapters.invocation_of(request.adapter_digest))
        self._num_arrived += 1
        self._has_news = True
        self._sequences[request.request_id] = sequence
        if request.sampling.guide is None:
            self._schedule(sequence)
        else:
            self._library.acquire(request.sampling.guide)
            self._compiling.append(sequence)

    def abort(self, request_id: str) -> None:
        """End a request without another word; nothing happens if it has ended already."""
        sequence = self._sequences.get(request_id)
        if sequence is None:
            return
        self._forget(sequence)
        if sequence in self._compiling:
            self._compiling.remove(sequence)
        else:
            self.scheduler.remove(sequence)
        self._has_news = True

    def load_adapter(self, spec: AdapterSpec) -> None:
        """Make an adapter version known."""
        self._has_news = True
        self.adapters.register(spec)

    def unload_adapter(self, digest: str) -> None:
        """Forget an adapter version; sequences that use it go on to their end."""
        self._has_news = True
        self.adapters.forget(digest)

    def keep_adapter(self, digest: str, is_kept: bool) -> None:
        """Have an adapter version ready although nobody waits for it, and evicted last; or no longer."""
        self.adapters.keep(digest, is_kept)

    def grammar_error(self, grammar: str) -> str | None:
        """Why a grammar cannot be used, or None; waits until it is compiled."""
        self._library.acquire(grammar)
        try:
            return self._library.error_of(grammar)
        finally:
            self._library.release(grammar)

    def close(self) -> None:
        """Stop the ranks and their threads; no step may follow."""
        self._executor.close()
        if self._grammars is not None:
            self._grammars.close()

    def step(self) -> StepOutput | None:
        """Plan, execute, advance. None when there is nothing to say.

        Running ahead: plan and launch a step, then advance by the one before.
        """
        for load in self._executor.finished_loads():
            self.adapters.finished(load)
            self._has_news = True
        if self._compiling:
            self._schedule_compiled()
        outputs, self._refused = self._refused, []
        outputs += [self._output(progress, None) for progress in self.scheduler.take_failed()]
        plan = self.scheduler.schedule()
        if plan is not None:
            began = time.perf_counter()
            self._executor.launch(plan)
            self._in_flight.append(_Flight(plan, began))
        self.is_idle = not self._in_flight
        if self._in_flight and (plan is None or len(self._in_flight) > self._num_ahead):
            outputs += self._read(self._in_flight.popleft())
        return self._report(outputs)

    def _read(self, flight: _Flight) -> list[TokenOutput]:
        """Wait for the results of the step launched first, and take them in."""
        result = self._executor.collect()
        outputs = self._advance(flight.plan, result)
        if flight.plan.sequences:
            now = time.perf_counter()
            # What it took beside the step before it.
            step_s = now - max(flight.began, self._read_at)
            self._read_at = now
            self._stats.count_step(flight.plan, result, step_s, sum(len(output.token_ids) for output in outputs))
            self._has_news = True
        return outputs

    def _schedule(self, sequence: Sequence) -> None:
        reason = self.scheduler.add(sequence)
        if reason is not None:
            self._refuse(sequence, f"adapter '{sequence.request.adapter_id}': {reason}")

    def _schedule_compiled(self) -> None:
        """Let the sequences run whose grammars are compiled; the others wait without holding anything."""
        grammars = self._library
        waiting, self._compiling = self._compiling, []
        for sequence in waiting:
            guide = sequence.request.sampling.guide
            if guide is None or not grammars.is_ready(guide):
                self._compiling.append(sequence)
            elif (error := grammars.error_of(guide)) is not None:
                self._refuse(sequence, f"the grammar is not valid: {error}")
            else:
                self._schedule(sequence)

    @property
    def _library(self) -> GrammarLibrary:
        assert self._grammars is not None, "a grammar came to an engine without a vocabulary"
        return self._grammars

    def _forget(self, sequence: Sequence) -> None:
        del self._sequences[sequence.request_id]
        if sequence.request.sampling.guide is not None:
            self._library.release(sequence.request.sampling.guide)

    def _refuse(self, sequence: Sequence, error: str) -> None:
        self._forget(sequence)
        self._refused.append(TokenOutput(request_id=sequence.request_id, finish_reason="error", error=error))

    def _advance(self, plan: StepPlan, result: StepResult) -> list[TokenOutput]:
        sequences = {sequence.row: sequence for sequence in self.scheduler.running}
        for planned in plan.sequences:
            if planned.target_ids and planned.row in sequences:
                logprobs = sequences[planned.row].prompt_logprobs
                assert logprobs is not None, "targets were planned for a sequence that wants none"
                logprobs += result.rows[planned.row].target_logprobs
                sequences[planned.row].prompt_top_logprobs += result.rows[planned.row].target_top_logprobs
        token_ids = {row: r.token_id for row, r in result.rows.items() if r.token_id is not None}
        rows = {id(sequence): row for row, sequence in sequences.items()}
        progress = self.scheduler.advance(plan, token_ids)
        return [self._output(p, result.rows[rows[id(p.sequence)]]) for p in progress]

    def _output(self, progress: Progress, result: RowResult | None) -> TokenOutput:
        sequence = progress.sequence
        if progress.finish_reason is not None:
            self._forget(sequence)
        if progress.token_id is None or result is None:
            error = progress.error if result is None else result.problem or progress.error
            return TokenOutput(request_id=sequence.request_id, finish_reason=progress.finish_reason, error=error)
        output = TokenOutput(
            request_id=sequence.request_id,
            token_ids=[progress.token_id],
            logprobs=[result.logprob],
            top_logprobs=[result.top_logprobs] if result.top_logprobs else [],
            finish_reason=progress.finish_reason,
        )
        return output if sequence.num_output_tokens > 1 else self._with_first_words(output, sequence)

    def _with_first_words(self, output: TokenOutput, sequence: Sequence) -> TokenOutput:
        """Add what comes once, with a request's first token."""
        self._stats.count_start(sequence)
        prompt_logprobs, sequence.prompt_logprobs = sequence.prompt_logprobs, None
        waited = (sequence.first_run_time or 0.0) - sequence.request.arrival_time
        return msgspec.structs.replace(
            output,
            num_cached_tokens=sequence.num_cached_tokens,
            prompt_logprobs=prompt_logprobs,
            prompt_top_logprobs=sequence.prompt_top_logprobs if prompt_logprobs is not None else [],
            queue_time_s=max(waited, 0.0),
        )

    def _report(self, outputs: list[TokenOutput]) -> StepOutput | None:
        now = time.monotonic()
        is_due = self._has_news and (now >= self._stats_due or not self._sequences)
        if not (outputs or is_due):
            return None
        if not is_due:
            return StepOutput(outputs=outputs)
        self._has_news = bool(self._sequences)
        self._stats_due = now + STATS_INTERVAL_S
        return StepOutput(outputs=outputs, stats=self._stats.report(self.scheduler, self.blocks, self.adapters))
