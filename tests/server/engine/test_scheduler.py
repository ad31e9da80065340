"""The scheduler on plain objects: its decisions, and what holds after any run."""

import random
from collections import deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loraplex_server.engine.adapters.host_cache import FinishedLoad
from loraplex_server.engine.adapters.manager import AdapterManager
from loraplex_server.engine.block_manager import BlockManager
from loraplex_server.engine.scheduler import Scheduler
from loraplex_server.engine.sequence import Sequence, Status, new_sequence
from loraplex_server.engine.step import FUTURE_TOKEN, StepPlan
from loraplex_server.messages import AdapterSpec, GenerateRequest, SamplingParams

END = 2
SIZE = 4


class Bench:
    """A scheduler whose model answers with a function of the tokens and the adapter, computed from its own KV cells.

    Each cell remembers what was written to it, so a step that reads a cell of other tokens or of another adapter
    gives a wrong answer here as it would in a real model. With `ahead` so many steps stay in flight when the next is
    planned: their adapters have moved then, and nothing of them is computed.
    """

    def __init__(
        self,
        num_blocks: int = 12,
        *,
        max_batch_size: int = 4,
        budget: int = 8,
        num_slots: int = 2,
        num_in_host: int = 3,
        starvation_bound_s: float = 50.0,
        ahead: int = 0,
    ):
        self.ahead = ahead
        self.blocks = BlockManager(num_blocks, SIZE)
        self.adapters = AdapterManager(num_slots, host_budget_bytes=num_in_host, device_budget_bytes=10**9)
        self.now = 0.0  # a step takes a second
        for digest in "abc":
            self.adapters.register(AdapterSpec(adapter_id=digest, digest=digest, path="", rank=1, num_bytes=1))
        self.scheduler = Scheduler(
            self.blocks,
            self.adapters,
            max_batch_size=max_batch_size,
            max_prefill_tokens=budget,
            end_token_ids=frozenset({END}),
            starvation_bound_s=starvation_bound_s,
            clock=lambda: self.now,
        )
        self.cells: dict[int, tuple[int, int, str | None]] = {}
        self.tables: dict[int, list[int]] = {}
        self.chosen: dict[int, int] = {}  # by row, what it chose last
        self.in_flight: deque[tuple[StepPlan, list[list[int]]]] = deque()  # with the blocks of each of its sequences
        self.ended: set[int] = set()
        self.slots: dict[int, str] = {}
        self.in_memory: set[str] = set()
        self.order = 0
        self.plans: list = []

    def add(self, prompt: list[int], adapter: str | None = None, max_new_tokens: int = 4, **sampling) -> Sequence:
        request = GenerateRequest(
            request_id=str(self.order),
            prompt_token_ids=prompt,
            sampling=SamplingParams(max_new_tokens=max_new_tokens, ignore_eos=True, **sampling),
            adapter_id=adapter,
            adapter_digest=adapter,
        )
        sequence = new_sequence(request, self.order)
        self.order += 1
        assert self.scheduler.add(sequence) is None
        return sequence

    def step(self) -> bool:
        self.now += 1
        plan = self.scheduler.schedule()
        if plan is not None:
            self.launch(plan)
        if not self.in_flight:
            return False
        for flight, tables in self.in_flight:
            rows = {s.row: s for s in [*self.scheduler.running, *self.scheduler._leaving]}
            for planned, table in zip(flight.sequences, tables, strict=True):
                assert rows[planned.row].block_ids[: len(table)] == table, "a step in flight has lost its blocks"
        if plan is None or len(self.in_flight) > self.ahead:
            flight, tables = self.in_flight.popleft()
            for progress in self.scheduler.advance(flight, self.compute(flight, tables)):
                assert progress.sequence.order not in self.ended, "a token behind the end"
                if progress.finish_reason:
                    self.ended.add(progress.sequence.order)
        self.blocks.check_integrity()
        self.adapters.check_integrity()
        return True

    def launch(self, plan: StepPlan) -> None:
        self.plans.append(plan)
        for op in plan.adapter_ops:
            match op.kind:
                case "host_load":
                    assert op.digest not in self.in_memory
                    self.in_memory.add(op.digest)
                case "host_evict":
                    self.in_memory.remove(op.digest)
                case "device_load":
                    assert op.digest in self.in_memory
                case "slot_load":
                    assert op.slot not in self.slots and op.digest in self.in_memory
                    self.slots[op.slot] = op.digest
                case "slot_clear":
                    assert self.slots.pop(op.slot) == op.digest
        for start in plan.row_starts:
            self.tables[start.row] = []
        for op in plan.adapter_ops:
            if op.kind in ("host_load", "device_load"):
                self.adapters.finished(FinishedLoad(op.digest, "host" if op.kind == "host_load" else "device", 1, None))
        for planned in plan.sequences:
            self.tables[planned.row] += planned.new_block_ids
        self.in_flight.append((plan, [list(self.tables[planned.row]) for planned in plan.sequences]))

    def compute(self, plan: StepPlan, tables: list[list[int]]) -> dict[int, int]:
        sampled = {}
        written: set[int] = set()
        for planned, table in zip(plan.sequences, tables, strict=True):
            adapter = self.slots[planned.slot] if planned.slot >= 0 else None
            for position, token in enumerate(planned.token_ids, planned.start):
                token = self.chosen[planned.row] if token == FUTURE_TOKEN else token
                cell = table[position // SIZE] * SIZE + position % SIZE
                assert cell not in written, "two sequences write one cell"
                written.add(cell)
                self.cells[cell] = (token, position, adapter)
            end = planned.start + len(planned.token_ids)
            context = [self.cells[table[p // SIZE] * SIZE + p % SIZE] for p in range(end)]
            assert [c[1] for c in context] == list(range(end))
            assert {c[2] for c in context} == {adapter}, "keys and values of another adapter"
            if planned.samples:
                sampled[planned.row] = answer([c[0] for c in context], adapter)
        self.chosen |= sampled
        return sampled

    def run(self, max_steps: int = 2000) -> None:
        for _ in range(max_steps):
            if not self.step():
                return
        pytest.fail("the scheduler does not come to an end")


def answer(context: list[int], adapter: str | None) -> int:
    return random.Random(f"{context}{adapter}").randrange(3, 50)


def expected(prompt: list[int], adapter: str | None, count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(answer(tokens, adapter))
    return tokens


def test_decoding_sequences_come_before_chunks_and_rows_are_ordered_by_slot():
    bench = Bench(budget=6)
    bench.add([3] * 3, "b")
    bench.add([4] * 3)
    bench.add([5] * 3, "a")
    for _ in range(3):
        bench.step()
    bench.add([6] * 5, "a")
    bench.step()
    plan = bench.plans[-1]
    assert plan.num_decodes == 3
    assert [s.slot for s in plan.sequences[:3]] == sorted(s.slot for s in plan.sequences[:3])
    assert len(plan.sequences[3].token_ids) == 5


def test_a_long_prompt_is_read_in_chunks_while_others_decode():
    bench = Bench(budget=8)
    short = bench.add([3] * 2, max_new_tokens=8)
    bench.step()
    bench.add(list(range(3, 23)))
    for _ in range(3):
        bench.step()
    chunks = [len(s.token_ids) for plan in bench.plans[1:] for s in plan.sequences if len(s.token_ids) > 1]
    assert chunks == [8, 8, 4]
    assert short.num_output_tokens == 4


def test_a_preempted_sequence_gives_back_its_blocks_and_ends_with_the_same_tokens():
    bench = Bench(num_blocks=6, max_batch_size=4, budget=32)
    prompts = [[7, i, 9, 10, 11, 12] for i in range(3)]
    sequences = [bench.add(prompt, max_new_tokens=14) for prompt in prompts]
    bench.run()
    assert bench.scheduler.num_preemptions > 0
    for sequence, prompt in zip(sequences, prompts, strict=True):
        assert sequence.token_ids == expected(prompt, None, 14)
    assert bench.blocks.num_used == 0


def test_the_oldest_sequence_is_never_preempted():
    bench = Bench(num_blocks=6, budget=32)
    oldest = bench.add([3] * 6, max_new_tokens=14)
    bench.add([4] * 6, max_new_tokens=14)
    bench.add([5] * 6, max_new_tokens=14)
    while oldest.status is not Status.FINISHED:
        bench.step()
        assert oldest.status is not Status.WAITING


def test_a_sequence_whose_adapter_is_on_its_way_holds_nothing_and_delays_nobody():
    bench = Bench()
    waiting = bench.add([3] * 4, "a")
    other = bench.add([4] * 4)
    plan = bench.scheduler.schedule()
    assert [s.row for s in plan.sequences] == [other.row]
    assert waiting.status is Status.WAITING and not waiting.block_ids


def test_more_adapters_than_slots_are_served_one_after_the_other():
    bench = Bench(num_slots=1)
    sequences = [bench.add([3, 4, 5], name) for name in "abcabc"]
    bench.run()
    for sequence in sequences:
        assert sequence.token_ids == expected([3, 4, 5], sequence.request.adapter_digest, 4)


def test_a_sequence_that_waits_for_a_slot_cannot_be_overtaken_for_ever():
    bench = Bench(num_slots=1, num_blocks=64)
    for _ in range(2):
        bench.add([3, 4], "a", max_new_tokens=3)
    waiting = bench.add([5, 6], "b")
    steps = 0
    while waiting.status is Status.WAITING:
        bench.add([3, 4], "a", max_new_tokens=3)
        bench.step()
        steps += 1
        assert steps < 500


def test_a_shared_head_is_computed_once_per_adapter():
    bench = Bench(num_blocks=64, budget=64)
    head = list(range(3, 19))
    for adapter in (None, "a", None, "a"):
        sequence = bench.add([*head, 40], adapter)
        bench.run()
        assert sequence.token_ids == expected([*head, 40], adapter, 4)
    assert [s.num_cached_tokens for s in (sequence,)] == [16]
    computed = [len(p.sequences[0].token_ids) for p in bench.plans if p.sequences and p.sequences[0].start in (0, 16)]
    assert computed == [17, 17, 1, 1]


def test_removing_a_sequence_frees_its_blocks_row_and_pin_at_once():
    bench = Bench()
    running = bench.add([3] * 6, "a")
    for _ in range(3):
        bench.step()
    assert running.status is Status.RUNNING
    waiting = bench.add([3] * 6, "b")
    bench.scheduler.remove(running)
    bench.scheduler.remove(waiting)
    assert bench.blocks.num_used == 0 and bench.adapters.num_pins == 0
    bench.run()


def test_a_failed_adapter_ends_its_waiting_sequences_and_no_other():
    bench = Bench()
    doomed = bench.add([3] * 4, "a")
    other = bench.add([3] * 4)
    bench.scheduler.schedule()
    bench.adapters.finished(FinishedLoad("a", "host", 0, "file gone"))
    failed = bench.scheduler.take_failed()
    assert [p.sequence for p in failed] == [doomed] and "file gone" in (failed[0].error or "")
    assert other.status is Status.RUNNING


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_mix_gives_each_sequence_its_own_answer_and_everything_back(data):
    bench = Bench(
        num_blocks=data.draw(st.integers(8, 20)),
        max_batch_size=data.draw(st.integers(1, 5)),
        budget=data.draw(st.integers(1, 20)),
        num_slots=data.draw(st.integers(1, 3)),
        num_in_host=data.draw(st.integers(1, 3)),
        starvation_bound_s=data.draw(st.sampled_from([0.0, 2.0, 10.0, 1000.0])),
        ahead=data.draw(st.integers(0, 1)),
    )
    live: list[tuple[Sequence, list[int], str | None, int]] = []
    for _ in range(data.draw(st.integers(1, 10))):
        prompt = [3] * data.draw(st.integers(0, 9)) + data.draw(st.lists(st.integers(3, 5), min_size=1, max_size=9))
        adapter = data.draw(st.sampled_from([None, "a", "b", "c"]))
        count = data.draw(st.integers(1, 12))
        live.append((bench.add(prompt, adapter, count), prompt, adapter, count))
        for _ in range(data.draw(st.integers(0, 3))):
            bench.step()
        if data.draw(st.integers(0, 4)) == 0:
            victim = live.pop(data.draw(st.integers(0, len(live) - 1)))
            bench.scheduler.remove(victim[0])
    bench.run()
    for sequence, prompt, adapter, count in live:
        assert sequence.status is Status.FINISHED
        assert sequence.token_ids == expected(prompt, adapter, count)
    assert bench.blocks.num_used == 0 and bench.adapters.num_pins == 0
    assert not bench.scheduler.waiting and not bench.scheduler.running
