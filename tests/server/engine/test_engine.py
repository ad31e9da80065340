"""The engine over a scripted executor: what each request hears, and what the reports add up to."""

import itertools

import msgspec
import pytest

from loraplex_server.config import AdapterConfig, EngineConfig
from loraplex_server.engine import engine as engine_module
from loraplex_server.engine.adapters.host_cache import FinishedLoad
from loraplex_server.engine.engine import Engine
from loraplex_server.engine.row_results import RowResult
from loraplex_server.engine.step import StepPlan
from loraplex_server.engine.worker import StepResult
from loraplex_server.messages import AdapterSpec, EngineStats, GenerateRequest, SamplingParams, TokenOutput

END = 2
SPEC = AdapterSpec(adapter_id="a", digest="d", path="/a", rank=1, num_bytes=1)


class ScriptedExecutor:
    """Answers every row with `token_id` and every adapter that is asked for with `load_error`."""

    def __init__(self, token_id: int = 7, load_error: str | None = None):
        self.token_id = token_id
        self.load_error = load_error
        self.plans: list[StepPlan] = []
        self._loads: list[FinishedLoad] = []

    def launch(self, plan: StepPlan) -> None:
        self.plans.append(plan)
        for operation in plan.adapter_ops:
            if operation.kind == "host_load":
                self._loads.append(FinishedLoad(operation.digest, "host", 1, self.load_error))
            elif operation.kind == "device_load":
                self._loads.append(FinishedLoad(operation.digest, "device", 1, None))

    def collect(self) -> StepResult:
        sequences = self.plans[-1].sequences
        return StepResult({s.row: RowResult(self.token_id, -0.5) for s in sequences if s.samples}, 0.25, 0.125)

    def finished_loads(self) -> list[FinishedLoad]:
        loads, self._loads = self._loads, []
        return loads

    def close(self) -> None:
        pass


class Bench:
    """An engine with the adapter `a`, every output by request, and every report."""

    def __init__(self, executor: ScriptedExecutor, **settings):
        config = EngineConfig(block_size=4, adapters=AdapterConfig(max_resident_adapters=2), **settings)
        self.engine = Engine(config, executor, num_kv_blocks=8, end_token_ids=frozenset({END}))
        self.engine.load_adapter(SPEC)
        self.outputs: dict[str, list[TokenOutput]] = {}
        self.reports: list[EngineStats] = []

    def add(self, name: str, prompt: list[int], digest: str | None = None, **sampling) -> None:
        params = SamplingParams(**({"max_new_tokens": 3} | sampling))
        self.engine.add(
            GenerateRequest(
                request_id=name, prompt_token_ids=prompt, sampling=params, adapter_id=digest, adapter_digest=digest
            )
        )

    def run(self, max_steps: int = 500) -> None:
        for _ in range(max_steps):
            if not self.engine.has_work:
                return
            output = self.engine.step()
            for one in output.outputs if output else []:
                self.outputs.setdefault(one.request_id, []).append(one)
            if output and output.stats:
                self.reports.append(output.stats)
        pytest.fail("the engine does not come to an end")

    def ends(self) -> dict[str, tuple[int, str | None, str | None]]:
        """How many tokens each request got, why it ended, and the error it heard of."""
        return {
            name: (sum(len(o.token_ids) for o in outputs), outputs[-1].finish_reason, outputs[-1].error)
            for name, outputs in self.outputs.items()
        }


def test_a_request_ends_at_its_length_or_at_an_end_token():
    bench = Bench(ScriptedExecutor())
    bench.add("length", [5], max_new_tokens=2)
    bench.add("stop id", [5], stop_token_ids=(7,))
    bench.run()
    assert bench.ends() == {"length": (2, "length", None), "stop id": (1, "eos_token", None)}
    bench = Bench(ScriptedExecutor(token_id=END))
    bench.add("end", [5])
    bench.add("goes on", [5], ignore_eos=True)
    bench.run()
    assert bench.ends() == {"end": (1, "eos_token", None), "goes on": (3, "length", None)}


def test_an_unknown_adapter_version_is_an_error_and_computes_nothing():
    executor = ScriptedExecutor()
    bench = Bench(executor)
    bench.add("lost", [5], "another digest")
    bench.run()
    (count, reason, error) = bench.ends()["lost"]
    assert (count, reason) == (0, "error") and error
    assert not any(plan.sequences for plan in executor.plans)


def test_an_adapter_that_cannot_be_loaded_ends_its_requests_with_the_reason_and_no_other():
    bench = Bench(ScriptedExecutor(load_error="its files have changed"))
    bench.add("with it", [5], "d")
    bench.add("base", [5])
    bench.run()
    assert bench.ends()["base"] == (3, "length", None)
    count, reason, error = bench.ends()["with it"]
    assert (count, reason) == (0, "error") and error is not None and "its files have changed" in error


def test_scores_that_are_not_numbers_end_the_request_with_an_error():
    bench = Bench(ScriptedExecutor(token_id=-1))
    bench.add("nan", [5])
    bench.run()
    count, reason, error = bench.ends()["nan"]
    assert (count, reason) == (0, "error") and error is not None and "finite" in error
    assert bench.engine.blocks.num_used == 0


def test_an_aborted_request_is_never_heard_of_again_and_a_second_abort_is_nothing():
    bench = Bench(ScriptedExecutor())
    bench.add("gone", [5], "d", max_new_tokens=20)
    bench.add("stays", [5])
    for _ in range(4):
        bench.engine.step()
    bench.engine.abort("gone")
    assert bench.engine.adapters.num_pins == 0
    bench.run()
    bench.engine.abort("gone")
    bench.engine.abort("never came")
    assert "gone" not in bench.outputs
    assert bench.engine.blocks.num_used == 0


def test_the_reports_add_up_to_what_was_done_and_end_at_zero(monkeypatch: pytest.MonkeyPatch):
    clock = itertools.count(step=1.0)
    monkeypatch.setattr(engine_module.time, "monotonic", lambda: next(clock))  # a report is due at every step
    executor = ScriptedExecutor()
    bench = Bench(executor, max_batch_size=4)
    prompts = {"one": [5], "long": list(range(10, 23)), "again": list(range(10, 23)), "with": [3, 4, 5]}
    for name, prompt in prompts.items():
        bench.add(name, prompt, "d" if name == "with" else None, max_new_tokens=12)
    bench.run()

    def total(field: str) -> int:
        return sum(getattr(report, field) for report in bench.reports)

    assert total("num_generated_tokens") == 12 * len(prompts)
    assert total("num_cached_tokens") == sum(outputs[0].num_cached_tokens for outputs in bench.outputs.values())
    assert total("num_prompt_tokens") == sum(map(len, prompts.values()))
    assert total("num_preemptions") == bench.engine.scheduler.num_preemptions > 0
    steps = sum(len(report.prefill_step_s) + len(report.decode_step_s) for report in bench.reports)
    assert steps == sum(bool(plan.sequences) for plan in executor.plans)
    assert {second for report in bench.reports for second in report.forward_s} == {0.25}
    last = bench.reports[-1]
    idle = ("num_running", "num_waiting", "num_kv_blocks_used", "num_running_tokens", "num_adapter_pins")
    assert [getattr(last, field) for field in idle] == [0] * 5
    assert max(report.num_running for report in bench.reports) > 1
    assert any(report.running_adapters == {"d": 1} for report in bench.reports)
    assert last.resident_adapter_ids == ["a"]


def test_an_idle_engine_says_nothing_twice():
    bench = Bench(ScriptedExecutor())
    bench.add("it", [5])
    bench.run()
    outputs = [bench.engine.step() for _ in range(5)]
    assert sum(output is not None for output in outputs) <= 1


def test_the_reports_tell_of_adapters_that_come_and_go_while_nothing_runs():
    bench = Bench(ScriptedExecutor())
    bench.run()
    bench.engine.load_adapter(msgspec.structs.replace(SPEC, digest="e"))
    reports = [bench.engine.step()]
    bench.engine.unload_adapter("e")
    reports.append(bench.engine.step())
    assert [o.stats.num_adapters_registered for o in reports if o is not None and o.stats is not None] == [2, 1]
    assert bench.engine.step() is None
