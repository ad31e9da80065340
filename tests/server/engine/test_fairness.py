"""Turns and bounds, counted in steps and tokens on a scheduler whose model says the same token for ever."""

import random
from collections.abc import Callable
from statistics import mean

import pytest

from loraplex_server.engine.adapters.host_cache import FinishedLoad
from loraplex_server.engine.adapters.manager import AdapterManager
from loraplex_server.engine.block_manager import BlockManager
from loraplex_server.engine.fair_queue import MAX_IDLE_TENANTS, MAX_LEAD, OUTPUT_TOKEN_COST, FairQueue
from loraplex_server.engine.scheduler import Scheduler
from loraplex_server.engine.sequence import Sequence, Status, new_sequence
from loraplex_server.messages import AdapterSpec, GenerateRequest, SamplingParams

BOUND = 40


def a_sequence(order: int, tenant: str | None, adapter: str | None = None, num_prompt: int = 4, num_output: int = 4):
    request = GenerateRequest(
        request_id=str(order),
        prompt_token_ids=random.Random(order).choices(range(3, 90), k=num_prompt),
        sampling=SamplingParams(max_new_tokens=num_output, ignore_eos=True),
        adapter_id=adapter,
        adapter_digest=adapter,
        tenant=tenant,
    )
    return new_sequence(request, order)


class Simulation:
    """A step takes one second. What each tenant was served is counted as FairQueue weighs it."""

    def __init__(
        self,
        *,
        num_rows: int = 8,
        budget: int = 64,
        num_slots: int = 4,
        num_blocks: int = 4096,
        host_adapters: int = 10**9,
    ):
        self.adapters = AdapterManager(num_slots, host_budget_bytes=host_adapters, device_budget_bytes=10**9)
        self.on_load: Callable[[FinishedLoad], None] = self.adapters.finished
        self.now = 0
        self.scheduler = Scheduler(
            BlockManager(4096, 4),
            self.adapters,
            max_batch_size=num_rows,
            max_prefill_tokens=budget,
            end_token_ids=frozenset(),
            starvation_bound_s=BOUND,
            clock=lambda: float(self.now),
        )
        self.order = 0
        self.served: dict[str, int] = {}
        self.arrived: dict[int, int] = {}
        self.ended: dict[int, int] = {}
        self.longest_wait = 0

    def register(self, digest: str) -> None:
        self.adapters.register(AdapterSpec(adapter_id=digest, digest=digest, path="", rank=1, num_bytes=1))

    def add(self, tenant: str | None, adapter: str | None = None, num_prompt: int = 4, num_output: int = 4) -> Sequence:
        sequence = a_sequence(self.order, tenant, adapter, num_prompt, num_output)
        self.arrived[self.order] = self.now
        self.order += 1
        assert self.scheduler.add(sequence) is None
        return sequence

    def step(self) -> None:
        self.now += 1
        plan = self.scheduler.schedule()
        if plan is None:
            return
        tenants = {s.row: s.tenant for s in self.scheduler.running}
        for index, planned in enumerate(plan.sequences):
            cost = OUTPUT_TOKEN_COST if index < plan.num_decodes else len(planned.token_ids)
            tenant = tenants[planned.row]
            self.served[tenant] = self.served.get(tenant, 0) + cost
        for op in plan.adapter_ops:
            if op.kind in ("host_load", "device_load"):
                self.on_load(FinishedLoad(op.digest, "host" if op.kind == "host_load" else "device", 1, None))
        for progress in self.scheduler.advance(plan, {s.row: 7 for s in plan.sequences if s.samples}):
            if progress.finish_reason:
                self.ended[progress.sequence.order] = self.now
        self.adapters.check_integrity()

    def latency(self, sequence: Sequence) -> int:
        return self.ended[sequence.order] - self.arrived[sequence.order]


def latencies_beside(num_greedy: int, *, is_fair: bool = True) -> list[float]:
    """Mean steps from arrival to end of three modest tenants, beside one that sends `num_greedy` requests at a time."""
    simulation = Simulation()
    modest: dict[str, list[Sequence]] = {name: [] for name in ("b", "c", "d")}
    for step in range(1500):
        if step % 24 == 0:
            for _ in range(num_greedy):
                simulation.add("a" if is_fair else "", num_prompt=8, num_output=32)
        for number, name in enumerate(modest):
            if step % 24 == 6 * (number + 1) and step < 1200:
                modest[name].append(simulation.add(name if is_fair else "", num_prompt=8, num_output=32))
        simulation.step()
    return [
        mean(simulation.latency(s) if s.order in simulation.ended else 1500 for s in own) for own in modest.values()
    ]


def test_a_tenant_at_ten_times_its_share_moves_no_other_by_more_than_its_own_work():
    own_work = 33  # a step for the prompt and one for each token but the first, on an idle machine
    alone = latencies_beside(1)
    beside_greed = latencies_beside(10)
    assert all(after - before <= own_work for before, after in zip(alone, beside_greed, strict=True))
    without_turns = latencies_beside(10, is_fair=False)
    assert all(after - before > 5 * own_work for before, after in zip(alone, without_turns, strict=True))


@pytest.mark.parametrize("seed", range(5))
def test_tenants_that_both_always_wait_are_served_alike_whatever_they_send(seed: int):
    draw = random.Random(seed)
    num_rows, longest = 6, 24
    simulation = Simulation(num_rows=num_rows, budget=draw.choice([16, 64]))
    shapes = {"few long": (24, 20), "many short": (3, 2), "long answers": (2, 24)}
    waiting = dict.fromkeys(shapes, 0)
    for step in range(1200):
        waiting = dict.fromkeys(shapes, 0)
        for sequence in simulation.scheduler.waiting:
            waiting[sequence.tenant] += 1
        for name, (num_prompt, num_output) in shapes.items():
            for _ in range(30 - waiting[name] if name == "many short" else 3 - waiting[name]):
                simulation.add(name, None, num_prompt, num_output)
        simulation.step()
        # Theorem 4.4 of the paper, with what fits into the batch.
        bound = 2 * max(longest, OUTPUT_TOKEN_COST * num_rows * longest)
        if step:
            assert max(simulation.served.values()) - min(simulation.served.get(n, 0) for n in shapes) <= bound


def test_a_tenant_that_was_away_comes_back_as_an_equal_and_not_with_credit():
    simulation = Simulation(num_rows=2)
    simulation.add("away", num_output=1)
    for _ in range(300):
        if len(simulation.scheduler.waiting) < 4:
            simulation.add("busy")
        simulation.step()
    simulation.served.clear()
    for _ in range(200):
        for tenant in ("busy", "away"):
            simulation.add(tenant)
        simulation.step()
    assert abs(simulation.served["busy"] - simulation.served["away"]) <= 2 * 2 * 8


def test_a_tenant_that_runs_without_ever_waiting_gives_newcomers_no_credit_over_it():
    queue = FairQueue()
    first = a_sequence(0, "first")
    queue.add(first)
    queue.remove(first)
    queue.charge("first", 10_000)
    queue.add(a_sequence(1, "second"))
    assert queue.served("second") == 10_000


def test_a_tenant_that_comes_back_is_not_passed_by_ever_newer_ones():
    simulation = Simulation(num_rows=1)
    simulation.add("returns")
    for number in range(8):
        simulation.add(f"first {number}")
    back: Sequence | None = None
    for step in range(BOUND - 1):
        if step % 4 == 0:
            simulation.add(f"new {step}")
        if step == 5:
            back = simulation.add("returns")
        simulation.step()
    for _ in range(BOUND):
        simulation.step()
    assert back is not None
    later = [order for order in simulation.ended if order > back.order]
    assert sum(simulation.ended[order] < simulation.ended[back.order] for order in later) <= 3


def test_what_a_tenant_took_while_nobody_needed_it_is_forgiven_but_for_a_bounded_rest():
    queue = FairQueue()
    for number in range(10):
        queue.add(a_sequence(number, f"waiting {number}"))
    queue.charge("busy", 10**6)
    queue.add(a_sequence(11, "newcomer"))
    queue.add(a_sequence(12, "busy"))
    assert queue.served("busy") - queue.served("newcomer") == MAX_LEAD


def test_a_short_prompt_does_not_wait_for_the_long_one_of_another_tenant():
    simulation = Simulation(budget=8)
    long = simulation.add("a", num_prompt=400, num_output=1)
    simulation.step()
    short = simulation.add("b", num_prompt=8, num_output=1)
    for _ in range(60):
        simulation.step()
    assert simulation.latency(short) <= 3
    assert simulation.latency(long) <= 52


def test_a_tenants_own_requests_are_begun_in_the_order_they_came():
    simulation = Simulation(num_rows=1)
    sequences = [simulation.add("a", adapter) for adapter in (None, None, None)]
    for _ in range(30):
        simulation.step()
    assert [simulation.latency(s) for s in sequences] == sorted(simulation.latency(s) for s in sequences)


def test_what_is_remembered_of_tenants_is_bounded_and_those_that_wait_are_not_forgotten():
    queue = FairQueue()
    patient = a_sequence(0, "patient")
    queue.add(patient)
    queue.charge("patient", 5)
    for number in range(1, 3 * MAX_IDLE_TENANTS):
        passing = a_sequence(number, f"tenant {number}")
        queue.add(passing)
        queue.charge(passing.tenant, 3)
        queue.remove(passing)
    assert len(queue._served) <= MAX_IDLE_TENANTS + 2
    assert queue.served("patient") == 5


def keep_busy(simulation: Simulation, adapters: str, num_output: int) -> None:
    """At least two requests for each of the adapters are there at any time."""
    counts = dict.fromkeys(adapters, 0)
    for sequence in [*simulation.scheduler.waiting, *simulation.scheduler.running]:
        if sequence.tenant in counts:
            counts[sequence.tenant] += 1
    for adapter, count in counts.items():
        for _ in range(2 - count):
            simulation.add(None, adapter, 4, num_output)


@pytest.mark.parametrize("num_output", [3, 30, 2000])
def test_no_request_waits_for_room_of_its_adapter_beyond_the_bound_and_one_turn(num_output: int):
    simulation = Simulation(num_slots=2)
    for digest in "abcd":
        simulation.register(digest)
    for _ in range(60):
        keep_busy(simulation, "ab", num_output)
        simulation.step()
    cold = [simulation.add(None, "c", 4, 5), simulation.add(None, "d", 4, 5)]
    while any(s.order not in simulation.ended for s in cold):
        keep_busy(simulation, "ab", num_output)
        simulation.step()
        # The bound, a turn of those that run (who may have begun just before), and the load of two tiers.
        assert simulation.now - simulation.arrived[cold[0].order] < 2 * (2 * BOUND + 10)
    # Those that end soon are let end.
    assert (simulation.scheduler.num_preemptions > 0) == (num_output > BOUND)


def test_no_request_waits_for_a_row_beyond_the_bound_when_others_were_served_more():
    simulation = Simulation(num_rows=2)
    for _ in range(6):
        simulation.add("a", num_output=2000)
    for _ in range(BOUND):
        simulation.step()
    modest = simulation.add("b", num_output=5)
    while modest.order not in simulation.ended:
        simulation.step()
        assert simulation.now < 3 * BOUND


def test_one_tenants_own_requests_never_preempt_each_other_however_long_they_wait():
    simulation = Simulation(num_rows=1)
    simulation.add("a", num_output=5 * BOUND)
    last = simulation.add("a", num_output=2)
    while last.order not in simulation.ended:
        simulation.step()
    assert simulation.scheduler.num_preemptions == 0


def test_a_request_beyond_the_bound_is_begun_before_any_other():
    simulation = Simulation(num_rows=1)
    simulation.add("a", num_output=BOUND + 5)
    simulation.step()
    simulation.scheduler.waiting.charge("b", 10**6)
    early = simulation.add("b")
    simulation.scheduler.waiting.charge("b", 10**6)
    for _ in range(BOUND):
        simulation.step()
    late = simulation.add("c")
    for _ in range(40):
        simulation.step()
    assert simulation.ended[early.order] < simulation.ended[late.order]
    assert early.status is Status.FINISHED


@pytest.mark.parametrize("exponent", [0.0, 1.0], ids=["uniform", "skewed"])
def test_a_thousand_adapters_over_small_pools_keep_every_request_below_the_bound(exponent: float):
    num_adapters, num_clients, load_steps = 1000, 32, 3
    simulation = Simulation(num_rows=64, num_slots=32, host_adapters=200)
    names = [f"adapter {number}" for number in range(num_adapters)]
    for name in names:
        simulation.register(name)
    weights = [1 / (rank + 1) ** exponent for rank in range(num_adapters)]
    draw = random.Random(0)
    loading: list[tuple[int, FinishedLoad]] = []
    simulation.on_load = lambda load: loading.append((simulation.now + load_steps, load))
    begun: dict[int, int] = {}
    clients: list[Sequence | None] = [None] * num_clients
    for _ in range(600):
        for client, sequence in enumerate(clients):
            if sequence is None or sequence.order in simulation.ended:
                (name,) = draw.choices(names, weights)
                clients[client] = simulation.add(None, name, 8, 4)
        for due, load in list(loading):
            if due <= simulation.now:
                loading.remove((due, load))
                simulation.adapters.finished(load)
        simulation.step()
        for sequence in simulation.scheduler.running:
            begun.setdefault(sequence.order, simulation.now)
        assert simulation.adapters.host.used_bytes <= 200 and simulation.adapters.device.used_bytes <= 32
    waits = sorted(begun[order] - simulation.arrived[order] for order in begun)
    assert waits[-1] < BOUND and len(simulation.ended) > 500
    assert simulation.now - min(simulation.arrived[s.order] for s in clients if s and s.order not in begun) < BOUND
