"""A scheduler without a model: what it plans is computed over cells that remember what was written to them."""

import random
from collections import deque

import pytest

from loraplex_server.engine.adapters.host_cache import FinishedLoad
from loraplex_server.engine.adapters.manager import AdapterManager
from loraplex_server.engine.block_manager import BlockManager
from loraplex_server.engine.scheduler import Scheduler
from loraplex_server.engine.sequence import Sequence, new_sequence
from loraplex_server.engine.step import FUTURE_TOKEN, StepPlan
from loraplex_server.messages import AdapterSpec, GenerateRequest, SamplingParams

END = 2
SIZE = 4


class SchedulerBench:
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
            rows = {s.row: s for s in [*self.scheduler.running, *self.scheduler._in_flight.leaving]}
            for planned, table in zip(flight.sequences, tables, strict=True):
                holder = rows.get(planned.row)
                assert holder and holder.block_ids[: len(table)] == table, "a step in flight has lost its blocks"
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
            adapter = self.slots.get(planned.slot)
            assert planned.slot < 0 or adapter is not None, "a step in flight has lost its adapter"
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


def expected(prompt: list[int], adapter: str | None, count: int, stops: tuple[int, ...] = ()) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(answer(tokens, adapter))
        if tokens[-1] in stops:
            break
    return tokens
