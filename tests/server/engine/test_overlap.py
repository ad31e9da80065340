"""Steps in flight: what is planned before tokens are read, what is read behind an end, and planted faults."""

from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from scheduler_bench import SchedulerBench, expected

from loraplex_server.config import EngineConfig
from loraplex_server.engine import engine as engine_module
from loraplex_server.engine.engine import Engine
from loraplex_server.engine.scheduler import Progress, Scheduler
from loraplex_server.engine.sequence import Sequence, new_sequence
from loraplex_server.engine.step import FUTURE_TOKEN, StepPlan
from loraplex_server.engine.worker import RowResult, StepResult
from loraplex_server.messages import GenerateRequest, SamplingParams, TokenOutput

END = 2
PROMPT = [40, 41, 42, 43, 44]


class LoggingExecutor:
    """Makes the tokens of a step when it is collected, by the number of the step, and notes the order of calls."""

    def __init__(self, token_of: Callable[[int], int] = lambda step_id: 100 + step_id):
        self.token_of = token_of
        self.calls: list[str] = []
        self.plans: list[StepPlan] = []
        self.num_collected = 0

    def launch(self, plan: StepPlan) -> None:
        self.plans.append(plan)
        self.calls.append(f"launch {len(self.plans)}")

    def collect(self) -> StepResult:
        plan = self.plans[self.num_collected]
        self.num_collected += 1
        self.calls.append(f"collect {self.num_collected}")
        return StepResult({s.row: RowResult(self.token_of(plan.step_id)) for s in plan.sequences if s.samples})

    def finished_loads(self) -> list[Any]:
        return []

    def close(self) -> None:
        pass


def an_engine(executor: LoggingExecutor, *, runs_ahead: bool = True) -> Engine:
    config = EngineConfig(block_size=4)
    return Engine(config, executor, num_kv_blocks=16, end_token_ids=frozenset({END}), runs_ahead=runs_ahead)


def request(name: str, **sampling: Any) -> GenerateRequest:
    return GenerateRequest(
        request_id=name, prompt_token_ids=PROMPT, sampling=SamplingParams(**({"max_new_tokens": 3} | sampling))
    )


def run(engine: Engine) -> list[TokenOutput]:
    found: list[TokenOutput] = []
    while engine.has_work:
        output = engine.step()
        found += output.outputs if output else []
    return found


@pytest.mark.parametrize("runs_ahead", [True, False])
def test_the_next_step_is_launched_before_the_tokens_of_the_one_before_are_read(runs_ahead: bool) -> None:
    executor = LoggingExecutor()
    engine = an_engine(executor, runs_ahead=runs_ahead)
    engine.add(request("it"))
    outputs = run(engine)
    assert [o.token_ids for o in outputs] == [[101], [102], [103]] and outputs[-1].finish_reason == "length"
    if runs_ahead:
        assert executor.calls == ["launch 1", "launch 2", "collect 1", "launch 3", "collect 2", "collect 3"]
    else:
        assert executor.calls == ["launch 1", "collect 1", "launch 2", "collect 2", "launch 3", "collect 3"]
    decoded = [plan.sequences[0].token_ids for plan in executor.plans[1:]]
    assert decoded == ([[FUTURE_TOKEN]] * 2 if runs_ahead else [[101], [102]])


def test_a_token_behind_an_end_token_is_computed_once_and_never_heard_of() -> None:
    executor = LoggingExecutor(lambda step_id: END if step_id == 3 else 50)
    engine = an_engine(executor)
    engine.add(request("it", max_new_tokens=20))
    outputs = run(engine)
    assert [o.token_ids for o in outputs] == [[50], [50], [END]]
    assert [o.finish_reason for o in outputs] == [None, None, "eos_token"]
    assert len(executor.plans) == 4 and executor.num_collected == 4
    assert engine.blocks.num_used == 0 and len(engine.scheduler._free_rows) == EngineConfig().max_batch_size


def test_scores_that_are_not_numbers_end_a_request_whose_next_step_is_in_flight() -> None:
    executor = LoggingExecutor(lambda step_id: -1 if step_id == 2 else 50)
    engine = an_engine(executor)
    engine.add(request("it", max_new_tokens=20))
    outputs = run(engine)
    assert [o.token_ids for o in outputs] == [[50], []]
    assert outputs[-1].finish_reason == "error" and "finite" in str(outputs[-1].error)
    assert engine.blocks.num_used == 0


def test_who_is_aborted_with_a_step_in_flight_holds_its_place_until_the_step_is_read() -> None:
    executor = LoggingExecutor()
    engine = an_engine(executor)
    engine.add(request("gone", max_new_tokens=20))
    engine.step()
    engine.abort("gone")
    assert engine.has_work and engine.blocks.num_used == 2
    assert engine.step() is None or not engine.step()
    assert not engine.has_work and engine.blocks.num_used == 0
    engine.add(request("next"))
    assert [o.request_id for o in run(engine)] == ["next"] * 3


def test_a_row_whose_choice_needs_the_tokens_before_is_in_no_step_before_they_are_read() -> None:
    executor = LoggingExecutor()
    engine = an_engine(executor)
    engine.add(request("ahead", max_new_tokens=6))
    engine.add(request("waits", max_new_tokens=3, watermark=True))
    outputs = run(engine)
    row = executor.plans[0].sequences[1].row
    planned = [[s.token_ids for s in plan.sequences if s.row == row] for plan in executor.plans]
    assert planned == [[PROMPT], [], [[101]], [], [[103]], []]
    assert [o.token_ids[0] for o in outputs if o.request_id == "waits"] == [101, 103, 105]
    assert [o.token_ids[0] for o in outputs if o.request_id == "ahead"] == [101, 102, 103, 104, 105, 106]


class KnownTokens(list[int]):
    """A sequence's tokens, which nobody may read beyond their end, nor count from it: the last ones are not known."""

    def __getitem__(self, key: Any) -> Any:
        ends = [key.start or 0, key.stop] if isinstance(key, slice) else [key]
        assert all(end is not None and 0 <= end <= len(self) for end in ends), f"tokens {key} of {len(self)} known ones"
        return super().__getitem__(key)


def play_with_guarded_tokens(monkeypatch: pytest.MonkeyPatch) -> list[TokenOutput]:
    """A run of prompts of chunks and blocks, with a prefix that hits, whose tokens are guarded."""

    def guarded(*arguments: Any) -> Sequence:
        sequence = new_sequence(*arguments)
        sequence.token_ids = KnownTokens(sequence.token_ids)
        return sequence

    monkeypatch.setattr(engine_module, "new_sequence", guarded)
    engine = an_engine(LoggingExecutor())
    engine.add(request("first", max_new_tokens=12))
    engine.add(request("second", max_new_tokens=7))
    outputs = run(engine)
    engine.add(request("third", max_new_tokens=2))
    return outputs + run(engine)


def test_planning_reads_no_token_of_a_step_in_flight(monkeypatch: pytest.MonkeyPatch) -> None:
    outputs = play_with_guarded_tokens(monkeypatch)
    assert sum(len(o.token_ids) for o in outputs) == 12 + 7 + 2
    assert [o.num_cached_tokens for o in outputs if o.request_id == "third"] == [4, 0]


def test_a_planted_look_at_tokens_in_flight_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Scheduler._commit_blocks
    monkeypatch.setattr(
        Scheduler, "_commit_blocks", lambda self, sequence, _: plain(self, sequence, sequence.num_computed_tokens)
    )
    with pytest.raises(AssertionError, match="known ones"):
        play_with_guarded_tokens(monkeypatch)


def _give_back_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(self: Scheduler, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._give_back(sequence)

    monkeypatch.setattr(Scheduler, "_stop", stop)


def _unpin_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Scheduler._stop

    def stop(self: Scheduler, sequence: Sequence) -> None:
        if sequence.request.adapter_digest:
            self._adapters.release(sequence.request.adapter_digest)
            sequence.request = msgspec.structs.replace(sequence.request, adapter_digest=None)
        plain(self, sequence)

    monkeypatch.setattr(Scheduler, "_stop", stop)


def _preempt_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Scheduler, "_is_short_of_blocks", lambda self: False)


def _stream_what_comes_behind_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Scheduler.advance

    def advance(self: Scheduler, plan: StepPlan, token_ids: dict[int, int]) -> list[Progress]:
        left = {s.row: s for s in self._in_flight.leaving}
        extra = [Progress(left[row], token_ids[row], None) for row in left.keys() & token_ids.keys()]
        return plain(self, plan, token_ids) + extra

    monkeypatch.setattr(Scheduler, "advance", advance)


def play_scheduler() -> int:
    """More adapters than slots, ends that nobody foresees, and few blocks or rows; returns the preemptions."""
    num_preemptions = 0
    for settings in ({"num_blocks": 9}, {"num_blocks": 12, "max_batch_size": 2}):
        bench = SchedulerBench(num_slots=1, budget=16, ahead=1, **settings)
        stops = tuple(range(3, 8))
        wanted: list[tuple[Sequence, list[int]]] = []
        for number in range(24):
            prompt, adapter = [3 + number % 2, 4, 5, 6 + number % 5], "abc"[number % 3] if number % 4 else None
            sequence = bench.add(prompt, adapter, 9, stop_token_ids=stops)
            wanted.append((sequence, expected(prompt, adapter, 9, stops)))
            bench.step()
        bench.run()
        assert all(sequence.token_ids == tokens for sequence, tokens in wanted)
        assert bench.blocks.num_used == 0 and bench.adapters.num_pins == 0
        num_preemptions += bench.scheduler.num_preemptions
    return num_preemptions


def test_scheduling_with_a_step_in_flight_gives_each_sequence_its_own_answer() -> None:
    assert play_scheduler() > 0


@pytest.mark.parametrize(
    ("plant", "found"),
    [
        (_give_back_at_once, "lost its blocks"),
        (_unpin_at_once, "lost its adapter"),
        (_preempt_at_once, "preempted before"),
        (_stream_what_comes_behind_the_end, "behind the end"),
    ],
)
def test_a_planted_fault_in_what_stays_with_a_step_in_flight_is_noticed(
    monkeypatch: pytest.MonkeyPatch, plant: Callable[[pytest.MonkeyPatch], None], found: str
) -> None:
    plant(monkeypatch)
    with pytest.raises(AssertionError, match=found):
        play_scheduler()
