"""Which sequences run in a step and how many tokens each: continuous batching with chunked prefill.

The scheduler only decides. Every decoding sequence gets a token. The step's prefill budget goes to half-read prompts
and to waiting sequences in the order of FairQueue: the tenant that was served least is next. A sequence whose adapter
is not on the device yet holds nothing and delays nobody; the adapters of those that wait are loaded ahead, in the same
order. When blocks run out the youngest running sequence is preempted: it gives everything back and is computed again
later. The oldest one is never preempted for a younger one, so it always moves on, and a request that fits the whole
cache (checked at admission) cannot deadlock.

A step may be planned while the one before is in flight: its tokens are counted, but their values are not known. Who
leaves meanwhile keeps its row, its blocks and the pin on its adapter until the last step that names it was read, so
that nobody else is given what a step in flight still reads or writes. Nobody is preempted then: the step is read first.

A hard bound stands above fairness: a sequence that has waited longer than it comes before all others, and where it
lacks a row, blocks or room for its adapter, sequences that have run for as long give way to it.
"""

import time
from bisect import insort
from collections.abc import Callable
from collections.abc import Sequence as Sequences
from dataclasses import dataclass
from heapq import heapify, heappop, heappush

from loraplex_server.engine import give_way
from loraplex_server.engine.adapters.manager import AdapterManager
from loraplex_server.engine.block_manager import BlockManager
from loraplex_server.engine.fair_queue import OUTPUT_TOKEN_COST, PROMPT_TOKEN_COST, FairQueue, Lane
from loraplex_server.engine.sequence import Sequence, Status
from loraplex_server.engine.step import RowStart, ScheduledSequence, StepPlan
from loraplex_server.engine.steps_in_flight import StepsInFlight
from loraplex_server.messages import FinishReason

# A waiting sequence lets idle adapters of later ones stay on the device for so long, to have them used before they go.
AFFINITY_S = 0.2

# Whose turn it is: overdue before all others (0), then the tenant's counter, then the order of arrival.
Turn = tuple[int, float, int]


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
        starvation_bound_s: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._blocks = blocks
        self._adapters = adapters
        self._max_prefill_tokens = max_prefill_tokens
        self._end_token_ids = end_token_ids
        self._starvation_bound_s = starvation_bound_s
        self._clock = clock
        self._free_rows = list(range(max_batch_size - 1, -1, -1))
        self._row_ends: list[int] = []
        self._in_flight = StepsInFlight()
        self._no_room: str | None = None  # the adapter that pressed in the last step and found no room
        # The adapter whose place an overdue one is to take, and the turn of that one: later ones are held back.
        self._giving_way: str | None = None
        self._overdue_turn: Turn = (0, 0.0, 0)
        self.waiting = FairQueue()
        self.running: list[Sequence] = []  # by order of arrival
        self.num_preemptions = 0

    def add(self, sequence: Sequence) -> str | None:
        """Let a sequence wait for its turn; returns the reason when its adapter cannot be had."""
        digest = sequence.request.adapter_digest
        reason = self._adapters.expect(digest) if digest else None
        if reason is None:
            sequence.waiting_since = self._clock()
            sequence.is_cold = not self._is_ready(digest)
            self.waiting.add(sequence)
        return reason

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out, wherever it is; all it holds is given back when no step in flight names it."""
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
        for digest, reason in self._adapters.take_failed():
            for lane in self.waiting.lanes_of(digest):
                for sequence in list(lane.sequences.values()):
                    self.remove(sequence)
                    message = f"adapter '{sequence.request.adapter_id}' could not be loaded: {reason}"
                    failed.append(Progress(sequence, None, "error", message))
        return failed

    def schedule(self) -> StepPlan | None:
        """Decide the next step; None when nothing could run now, or not before the step in flight is read."""
        now = self._clock()
        if (self._in_flight and self._is_short_of_blocks()) or not self._make_way(now):
            return None
        decodes: list[ScheduledSequence] = []
        chunks: list[ScheduledSequence] = []
        starts: list[RowStart] = []
        half_read: list[Sequence] = []
        preemptions_before = self.num_preemptions
        for sequence in list(self.running):
            if sequence.status is not Status.RUNNING:
                continue  # preempted for an older one, earlier in this loop
            if sequence.num_pending_tokens and not sequence.can_run_ahead:
                continue
            if sequence.num_uncomputed_tokens > 1:
                half_read.append(sequence)
                continue
            new_block_ids = self._extend(sequence)
            if new_block_ids is not None:
                decodes.append(sequence.plan(self._in_flight.next_id, 1, new_block_ids))
                self.waiting.charge(sequence.tenant, OUTPUT_TOKEN_COST)
        # What was just given back is for those that run.
        may_start = self.num_preemptions == preemptions_before
        self._prefill(half_read, may_start, now, decodes, chunks, starts)
        self._prefetch(now)
        if not (decodes or chunks or self._adapters.has_ops):
            return None
        decodes.sort(key=lambda s: s.slot)
        chunks.sort(key=lambda s: s.slot)
        row_ends, self._row_ends = self._row_ends, []
        return StepPlan(
            step_id=self._in_flight.add(),
            sequences=decodes + chunks,
            num_decodes=len(decodes),
            adapter_ops=self._adapters.take_ops(),
            row_starts=starts,
            row_ends=row_ends,
        )

    def advance(self, plan: StepPlan, token_ids: dict[int, int]) -> list[Progress]:
        """Take in a step's result: `token_ids` by row, for the rows that sampled. A negative id: no valid token."""
        for sequence in self._in_flight.read(plan.step_id):
            self._give_back(sequence)
        by_row = {sequence.row: sequence for sequence in self.running}
        progress: list[Progress] = []
        for planned in plan.sequences:
            if planned.row not in by_row:
                continue  # left while the step ran
            sequence = by_row[planned.row]
            self._commit_blocks(sequence, planned.start + len(planned.token_ids))
            if planned.samples:
                sequence.num_pending_tokens -= 1
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

    def _prefill(
        self,
        half_read: list[Sequence],
        may_start: bool,
        now: float,
        decodes: list[ScheduledSequence],
        chunks: list[ScheduledSequence],
        starts: list[RowStart],
    ) -> None:
        """Spend the prefill budget on half-read prompts and on waiting sequences, each tenant in its turn."""
        budget = self._max_prefill_tokens
        turns: list[tuple[Turn, Sequence | Lane]] = [
            (self._turn_of(s, now), s) for s in half_read if s.status is Status.RUNNING
        ]
        if may_start and self._free_rows and self.waiting:
            turns += [(self._turn_of(lane, now), lane) for lane in self.waiting.lanes() if self._may_start(lane, now)]
        heapify(turns)
        while turns and budget:
            turn, item = heappop(turns)
            if (current := self._turn_of(item, now)) > turn:  # its tenant was served meanwhile
                heappush(turns, (current, item))
                continue
            if isinstance(item, Sequence):
                sequence, new_block_ids = item, []
            elif may_start and self._free_rows:
                sequence = item.head
                held = self._hold_blocks(sequence)
                if held is None:
                    may_start = False  # nobody passes, or a long prompt would wait for ever
                    continue
                new_block_ids = held
                starts.append(self._start(sequence, held, now))
                if item.sequences:
                    heappush(turns, (self._turn_of(item, now), item))
            else:
                continue
            is_decode = sequence.num_uncomputed_tokens == 1
            count = min(sequence.num_uncomputed_tokens, budget)
            budget -= count
            self._charge_prompt(sequence, sequence.num_computed_tokens + count)
            planned = sequence.plan(self._in_flight.next_id, count, list(new_block_ids))
            (decodes if is_decode else chunks).append(planned)

    def _charge_prompt(self, sequence: Sequence, end: int) -> None:
        """Charge for the tokens up to `end`, except those of the cached head and those computed a second time."""
        start = max(sequence.num_charged_tokens, sequence.num_computed_tokens)
        if end > start:
            self.waiting.charge(sequence.tenant, PROMPT_TOKEN_COST * (end - start))
            sequence.num_charged_tokens = end

    def _turn_of(self, item: Sequence | Lane, now: float) -> Turn:
        served = self.waiting.served(item.tenant)
        if isinstance(item, Sequence):
            # Up to one step's budget a prompt keeps the turn it was begun in, so that short ones are read at once.
            return (1, served - min(item.num_computed_tokens, self._max_prefill_tokens), item.order)
        is_overdue = self.waiting.passed_over_s(item, now) >= self._starvation_bound_s
        return (0 if is_overdue else 1, served, item.head.order)

    def _may_start(self, lane: Lane, now: float) -> bool:
        """Whether the lane's adapter is there, and no overdue one whose turn is earlier needs its place."""
        if not self._is_ready(lane.digest):
            return False
        if lane.digest is None or self._giving_way is None or self._turn_of(lane, now) < self._overdue_turn:
            return True
        return self._adapters.is_pinned(lane.digest) and lane.digest != self._giving_way

    def _is_ready(self, digest: str | None) -> bool:
        return digest is None or self._adapters.is_ready(digest)

    def _prefetch(self, now: float) -> None:
        """Have the adapters of the waiting sequences loaded, in the order of their turns."""
        self._no_room = None
        lanes = [lane for lane in self.waiting.lanes() if lane.digest is not None]
        if all(self._is_ready(lane.digest) for lane in lanes) and not self._adapters.is_short_of_kept:
            return
        lanes.sort(key=lambda lane: self._turn_of(lane, now))
        wanted: dict[str, bool] = {}
        for lane in lanes:
            assert lane.digest is not None
            wanted.setdefault(lane.digest, False)
            wanted[lane.digest] |= now - lane.head.waiting_since >= AFFINITY_S
        self._no_room = self._adapters.want(wanted)

    def _make_way(self, now: float) -> bool:
        """Let who was passed over for longer than the bound have what it lacks, from those that have had a turn.

        False: the step in flight must be read before those can give way.
        """
        self._giving_way = None
        overdue = [lane for lane in self.waiting.lanes() if lane.passed_over_s(now) >= self._starvation_bound_s]
        for lane in sorted(overdue, key=lambda lane: self._turn_of(lane, now)):
            victims = self._victims_for(lane, now)
            if all(give_way.has_had_its_turn(s, now, self._starvation_bound_s) for s in victims):
                if victims and self._in_flight:
                    return False
                for sequence in reversed(victims):
                    self._preempt(sequence)
            if victims or self._giving_way is not None:
                self._overdue_turn = self._turn_of(lane, now)
                return True
        return True

    def _victims_for(self, lane: Lane, now: float) -> Sequences[Sequence]:
        if not self._is_ready(lane.digest):
            if lane.digest != self._no_room:
                return []  # it is on its way
            self._giving_way, victims = give_way.adapter_to_free(self.running, self.waiting, lane)
            return victims
        has_room = self._free_rows and self._has_blocks_for(lane.head)
        if has_room or self.waiting.passed_over_s(lane, now) < self._starvation_bound_s:
            return []
        return give_way.row_to_free(self.running, self.waiting, lane)

    def _has_blocks_for(self, sequence: Sequence) -> bool:
        return self._blocks.num_blocks_for(len(sequence.token_ids)) + len(self.running) <= self._blocks.num_free

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

    def _start(self, sequence: Sequence, block_ids: list[int], now: float) -> RowStart:
        self.waiting.start(sequence, now)
        insort(self.running, sequence, key=lambda s: s.order)
        sequence.running_since = now
        sequence.num_tokens_at_start = len(sequence.token_ids)
        sequence.status = Status.RUNNING
        sequence.row = self._free_rows.pop()
        sequence.block_ids = block_ids
        sequence.num_committed_blocks = sequence.num_computed_tokens // self._blocks.block_size
        digest = sequence.request.adapter_digest
        sequence.slot = self._adapters.acquire(digest) if digest else -1
        if sequence.first_run_time is None:
            sequence.first_run_time = now
            sequence.num_cached_tokens = sequence.num_computed_tokens
        return RowStart(
            row=sequence.row,
            sampling=sequence.request.sampling,
            token_ids=sequence.token_ids,
            num_output_tokens=sequence.num_output_tokens,
        )

    def _is_short_of_blocks(self) -> bool:
        """Whether not all running sequences can have a block where they need one for their next token."""
        if self._blocks.num_free >= len(self.running):
            return False
        some = (s for s in self.running if not s.num_pending_tokens or s.can_run_ahead)
        return sum(max(self._num_missing_blocks(s), 0) for s in some) > self._blocks.num_free

    def _num_missing_blocks(self, sequence: Sequence) -> int:
        return self._blocks.num_blocks_for(sequence.num_computed_tokens + 1) - len(sequence.block_ids)

    def _extend(self, sequence: Sequence) -> list[int] | None:
        """Blocks for one more token of a running sequence, preempting younger ones; None if it must go itself."""
        needed = self._num_missing_blocks(sequence)
        while needed > self._blocks.num_free:
            victim = self.running[-1]
            self._preempt(victim)
            if victim is sequence:
                return None
        new_block_ids = self._blocks.allocate(max(needed, 0))
        sequence.block_ids += new_block_ids
        return new_block_ids

    def _preempt(self, sequence: Sequence) -> None:
        assert not self._in_flight, "a sequence is preempted before its tokens are read"
        self.running.remove(sequence)
        self._give_back(sequence, will_return=True)
        sequence.status = Status.WAITING
        sequence.num_charged_tokens = max(sequence.num_charged_tokens, sequence.num_computed_tokens)
        sequence.num_computed_tokens = 0
        if sequence.prompt_logprobs is not None:
            sequence.prompt_logprobs = [None]
            sequence.prompt_top_logprobs = sequence.prompt_top_logprobs[:1]
        sequence.waiting_since = self._clock()
        self.waiting.add(sequence)
        self.num_preemptions += 1

    def _stop(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        if self._in_flight.has(sequence):
            self._in_flight.leaving.append(sequence)
        else:
            self._give_back(sequence)

    def _give_back(self, sequence: Sequence, *, will_return: bool = False) -> None:
        self._blocks.free(sequence.block_ids)
        sequence.block_ids = []
        self._free_rows.append(sequence.row)
        self._row_ends.append(sequence.row)
        sequence.row = sequence.slot = -1
        if sequence.request.adapter_digest:
            self._adapters.release(sequence.request.adapter_digest, will_return=will_return)

    def _commit_blocks(self, sequence: Sequence, num_tokens: int) -> None:
        """Name the blocks whose cells are all computed, by the steps that were read: those of so many tokens."""
        size = self._blocks.block_size
        num_full = num_tokens // size
        hashes = sequence.hashes(num_full, size)
        for index in range(sequence.num_committed_blocks, num_full):
            self._blocks.commit(hashes[index], sequence.block_ids[index])
        sequence.num_committed_blocks = num_full
