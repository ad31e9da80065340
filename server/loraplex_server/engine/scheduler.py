"""Which sequences run in a step and how many tokens each: continuous batching with chunked prefill.

The scheduler only decides. Running sequences go first: each decoding one gets a token, each half-read prompt its next
chunk. What is left of the step's prefill budget goes to waiting sequences, oldest first. When blocks run out the
youngest running sequence is preempted: it gives everything back and is computed again later. The oldest one is never
preempted for a younger one, so it always moves on, and a request that fits the whole cache (checked at admission)
cannot deadlock.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

from loraplex_server.engine.adapters.manager import AdapterManager
from loraplex_server.engine.block_manager import BlockManager
from loraplex_server.engine.sequence import Sequence, Status
from loraplex_server.engine.step import RowStart, ScheduledSequence, StepPlan
from loraplex_server.messages import FinishReason

# A sequence that waits for an adapter slot may be overtaken this often; then nothing else starts before it.
MAX_TIMES_OVERTAKEN = 64


@dataclass(frozen=True, slots=True)
class Progress:
    """What a step gave one sequence: a token, the end, both, or neither."""

    sequence: Sequence
    token_id: int | None
    finish_reason: FinishReason | None
    error: str | None = None


class Scheduler:
    """The owner of all sequences."""

    def __init__(
        self,
        blocks: BlockManager,
        adapters: AdapterManager,
        *,
        max_batch_size: int,
        max_prefill_tokens: int,
        end_token_ids: frozenset[int],
        clock: Callable[[], float] = time.monotonic,
    ):
        self._blocks = blocks
        self._adapters = adapters
        self._max_prefill_tokens = max_prefill_tokens
        self._end_token_ids = end_token_ids
        self._clock = clock
        self._free_rows = list(range(max_batch_size - 1, -1, -1))
        self._row_ends: list[int] = []
        self._step_id = 0
        self.waiting: list[Sequence] = []  # by order of arrival
        self.running: list[Sequence] = []  # by order of arrival
        self.num_preemptions = 0

    def add(self, sequence: Sequence) -> str | None:
        """Let a sequence wait for its turn; returns the reason when its adapter cannot be had."""
        digest = sequence.request.adapter_digest
        reason = self._adapters.expect(digest) if digest else None
        if reason is None:
            self.waiting.append(sequence)
        return reason

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out, wherever it is, and give back all it holds."""
        if sequence.status is Status.RUNNING:
            self._stop(sequence)
        elif sequence.status is Status.WAITING:
            self.waiting.remove(sequence)
            if sequence.request.adapter_digest:
                self._adapters.unexpect(sequence.request.adapter_digest)
        sequence.status = Status.FINISHED

    def take_failed(self) -> list[Progress]:
        """End the waiting sequences whose adapter could not be loaded."""
        failed: list[Progress] = []
        for sequence in list(self.waiting):
            digest = sequence.request.adapter_digest
            error = self._adapters.error_of(digest) if digest else None
            if error is not None:
                self.remove(sequence)
                message = f"adapter '{sequence.request.adapter_id}' could not be loaded: {error}"
                failed.append(Progress(sequence, None, "error", message))
        return failed

    def schedule(self) -> StepPlan | None:
        """Decide the next step; None when there is nothing that could run now."""
        decodes: list[ScheduledSequence] = []
        chunks: list[ScheduledSequence] = []
        starts: list[RowStart] = []
        budget = self._max_prefill_tokens
        preemptions_before = self.num_preemptions
        for sequence in list(self.running):
            if sequence.status is not Status.RUNNING:
                continue  # preempted for an older one, earlier in this loop
            is_decode = sequence.num_uncomputed_tokens == 1
            count = 1 if is_decode else min(sequence.num_uncomputed_tokens, budget)
            if count == 0:
                continue
            new_block_ids = self._extend(sequence, count)
            if new_block_ids is None:
                continue
            if is_decode:
                decodes.append(_scheduled(sequence, count, new_block_ids))
            else:
                chunks.append(_scheduled(sequence, count, new_block_ids))
                budget -= count
        if self.num_preemptions == preemptions_before:  # what was just given back is for those that run
            self._admit(budget, decodes, chunks, starts)
        if not (decodes or chunks or self._adapters.has_ops):
            return None
        decodes.sort(key=lambda s: s.slot)
        chunks.sort(key=lambda s: s.slot)
        row_ends, self._row_ends = self._row_ends, []
        self._step_id += 1
        return StepPlan(
            step_id=self._step_id,
            sequences=decodes + chunks,
            num_decodes=len(decodes),
            adapter_ops=self._adapters.take_ops(),
            row_starts=starts,
            row_ends=row_ends,
        )

    def advance(self, plan: StepPlan, token_ids: dict[int, int]) -> list[Progress]:
        """Take in a step's result: `token_ids` by row, for the rows that sampled. A negative id: no valid token."""
        by_row = {sequence.row: sequence for sequence in self.running}
        progress: list[Progress] = []
        for planned in plan.sequences:
            sequence = by_row.get(planned.row)
            if sequence is None:
                continue  # left while the step ran
            sequence.num_computed_tokens += len(planned.token_ids)
            self._commit_blocks(sequence)
            if planned.samples:
                progress.append(self._append(sequence, token_ids[planned.row]))
        return progress

    def _append(self, sequence: Sequence, token_id: int) -> Progress:
        if token_id < 0:
            self.remove(sequence)
            return Progress(sequence, None, "error", "the model's scores for the next token are not finite numbers")
        sequence.token_ids.append(token_id)
        sampling = sequence.request.sampling
        reason: FinishReason | None = None
        if sequence.num_output_tokens >= sampling.max_new_tokens:
            reason = "length"
        elif token_id in sampling.stop_token_ids or (token_id in self._end_token_ids and not sampling.ignore_eos):
            reason = "eos_token"
        if reason is not None:
            self.remove(sequence)
        return Progress(sequence, token_id, reason)

    def _admit(
        self,
        budget: int,
        decodes: list[ScheduledSequence],
        chunks: list[ScheduledSequence],
        starts: list[RowStart],
    ) -> None:
        """Start waiting sequences, oldest first, while budget, rows, blocks and adapter slots last."""
        skipped: list[Sequence] = []
        for sequence in list(self.waiting):
            if budget == 0 or not self._free_rows:
                break
            if any(other.times_overtaken >= MAX_TIMES_OVERTAKEN for other in skipped):
                break
            digest = sequence.request.adapter_digest
            if digest is not None and not self._adapters.can_acquire(digest):
                if self._adapters.is_loaded(digest):
                    skipped.append(sequence)
                continue
            block_ids = self._hold_blocks(sequence)
            if block_ids is None:
                break  # the oldest comes first, or a long prompt would wait for ever
            for other in skipped:
                other.times_overtaken += 1
            starts.append(self._start(sequence, block_ids))
            is_decode = sequence.num_uncomputed_tokens == 1
            count = min(sequence.num_uncomputed_tokens, budget)
            budget -= count
            (decodes if is_decode else chunks).append(_scheduled(sequence, count, list(sequence.block_ids)))

    def _hold_blocks(self, sequence: Sequence) -> list[int] | None:
        """Blocks for all of a waiting sequence's tokens, its cached head first; None, holding none, if too few."""
        size = self._blocks.block_size
        num_tokens = len(sequence.token_ids)
        # Prompt log-probabilities need every position computed, so a cached head is of no use to them.
        # Otherwise at least one token is left to compute, since its logits are needed.
        num_known = 0 if sequence.prompt_logprobs is not None else (num_tokens - 1) // size
        head = self._blocks.match_prefix(sequence.hashes(num_known, size))
        missing = self._blocks.num_blocks_for(num_tokens) - len(head)
        # A block for each running sequence stays free: otherwise the next step would have to preempt.
        if missing + len(self.running) > self._blocks.num_free:
            self._blocks.free(head)
            return None
        sequence.num_computed_tokens = len(head) * size
        return head + self._blocks.allocate(missing)

    def _start(self, sequence: Sequence, block_ids: list[int]) -> RowStart:
        self.waiting.remove(sequence)
        self.running.append(sequence)
        self.running.sort(key=lambda s: s.order)
        sequence.status = Status.RUNNING
        sequence.row = self._free_rows.pop()
        sequence.block_ids = block_ids
        sequence.num_committed_blocks = sequence.num_computed_tokens // self._blocks.block_size
        sequence.times_overtaken = 0
        digest = sequence.request.adapter_digest
        sequence.slot = self._adapters.acquire(digest) if digest else -1
        if sequence.first_run_time is None:
            sequence.first_run_time = self._clock()
            sequence.num_cached_tokens = sequence.num_computed_tokens
        return RowStart(
            row=sequence.row,
            sampling=sequence.request.sampling,
            token_ids=sequence.token_ids,
            num_output_tokens=sequence.num_output_tokens,
        )

    def _extend(self, sequence: Sequence, count: int) -> list[int] | None:
        """Blocks for `count` more tokens of a running sequence, preempting younger ones; None if it must go itself."""
        needed = self._blocks.num_blocks_for(sequence.num_computed_tokens + count) - len(sequence.block_ids)
        while needed > self._blocks.num_free:
            victim = self.running[-1]
            self._preempt(victim)
            if victim is sequence:
                return None
        new_block_ids = self._blocks.allocate(max(needed, 0))
        sequence.block_ids += new_block_ids
        return new_block_ids

    def _preempt(self, sequence: Sequence) -> None:
        self._stop(sequence, will_return=True)
        sequence.status = Status.WAITING
        sequence.num_computed_tokens = 0
        if sequence.prompt_logprobs is not None:
            sequence.prompt_logprobs = [None]
            sequence.prompt_top_logprobs = sequence.prompt_top_logprobs[:1]
        self.waiting.append(sequence)
        self.waiting.sort(key=lambda s: s.order)
        self.num_preemptions += 1

    def _stop(self, sequence: Sequence, *, will_return: bool = False) -> None:
        self.running.remove(sequence)
        self._blocks.free(sequence.block_ids)
        sequence.block_ids = []
        self._free_rows.append(sequence.row)
        self._row_ends.append(sequence.row)
        sequence.row = sequence.slot = -1
        if sequence.request.adapter_digest:
            self._adapters.release(sequence.request.adapter_digest, will_return=will_return)

    def _commit_blocks(self, sequence: Sequence) -> None:
        """Name the blocks whose cells are all computed."""
        size = self._blocks.block_size
        num_full = sequence.num_computed_tokens // size
        hashes = sequence.hashes(num_full, size)
        for index in range(sequence.num_committed_blocks, num_full):
            self._blocks.commit(hashes[index], sequence.block_ids[index])
        sequence.num_committed_blocks = num_full


def _scheduled(sequence: Sequence, count: int, new_block_ids: list[int]) -> ScheduledSequence:
    end = sequence.num_computed_tokens + count
    targets: list[int] = []
    if sequence.prompt_logprobs is not None and sequence.num_computed_tokens < sequence.num_prompt_tokens - 1:
        targets = sequence.token_ids[sequence.num_computed_tokens + 1 : min(end + 1, sequence.num_prompt_tokens)]
    return ScheduledSequence(
        row=sequence.row,
        token_ids=list(sequence.uncomputed(count)),
        start=sequence.num_computed_tokens,
        new_block_ids=new_block_ids,
        slot=sequence.slot,
        samples=end == len(sequence.token_ids),
        target_ids=targets,
    )
