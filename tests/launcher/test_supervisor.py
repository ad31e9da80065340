import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from loraplex import child
from loraplex.child import Child
from loraplex.plan import ProcessSpec

RUN_SUPERVISOR = Path(__file__).with_name("run_supervisor.py")
FAKE_CHILD = Path(__file__).with_name("fake_child.py")
REPOSITORY = Path(__file__).parents[2]
DEADLINE_S = 120  # none of these takes more than a few seconds; this only ends a test that would wait forever


class Run:
    """A supervisor in a process of its own, over fake children that leave marks in a folder."""

    def __init__(self, marks: Path, *children: str, timeout_s: int = 5, grace_s: float = 30, restarts: int = 0):
        self.marks = marks
        self.temp = marks / "tmp"
        self.temp.mkdir()
        roots = ["launcher", "server", "models", "quant", "kernels"]
        self.process = subprocess.Popen(
            [sys.executable, str(RUN_SUPERVISOR), str(marks), str(timeout_s), str(grace_s), str(restarts), *children],
            stderr=subprocess.PIPE,
            text=True,
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join(str(REPOSITORY / root) for root in roots),
                "TMPDIR": str(self.temp),
            },
        )
        self.errors = ""

    def finish(self) -> int:
        _, self.errors = self.process.communicate(timeout=DEADLINE_S)
        return self.process.returncode

    def wait_for(self, mark: str) -> None:
        wait_until((self.marks / mark).exists, f"{mark} in {[file.name for file in self.marks.iterdir()]}")

    def pids(self) -> list[int]:
        return [pid_of(mark) for mark in self.marks.glob("pid-*")]

    def kill_all(self) -> None:
        self.process.kill()
        self.process.wait()
        if self.process.stderr is not None:
            self.process.stderr.close()
        for pid in self.pids():
            if is_alive(pid):
                os.kill(pid, signal.SIGKILL)


def pid_of(mark: Path) -> int:
    return int(mark.name.rpartition("-")[2])


def is_alive(pid: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


def wait_until(is_true: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not is_true():
        assert time.monotonic() < deadline, f"never came: {what}"
        time.sleep(0.02)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Run]]:
    runs: list[Run] = []

    def begin(*children: str, **settings: float) -> Run:
        runs.append(Run(tmp_path, *children, **settings))
        return runs[-1]

    yield begin
    for run in runs:
        run.kill_all()


def assert_all_gone(run: Run) -> None:
    assert run.pids()
    wait_until(lambda: not any(is_alive(pid) for pid in run.pids()), "the end of every child")


def test_it_says_ready_once_every_child_is_and_shows_their_reports(start: Callable[..., Run]) -> None:
    run = start("api=serve", "engine=work")
    run.wait_for("ready-serve")
    run.wait_for("ready-work")
    run.process.send_signal(signal.SIGTERM)
    assert run.finish() == 0
    assert "serve reports" in run.errors
    assert "work reports" in run.errors
    assert_all_gone(run)


def test_the_ready_line_names_the_address(start: Callable[..., Run]) -> None:
    run = start("api=serve", "engine=work")
    assert run.process.stderr is not None
    lines = iter(run.process.stderr.readline, "")
    assert any("ready on http://127.0.0.1:3999" in line for line in lines)


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_signal_lets_the_api_drain_and_then_stops_the_engine(start: Callable[..., Run], stop: int) -> None:
    run = start("api=slow_drain", "engine=work")
    run.wait_for("ready-slow_drain")
    run.wait_for("ready-work")
    run.process.send_signal(stop)
    assert run.finish() == 0
    drained = (run.marks / "drained-slow_drain").stat().st_mtime_ns
    assert (run.marks / "sigterm-work").stat().st_mtime_ns >= drained
    assert_all_gone(run)


def test_a_second_signal_does_not_wait_for_the_drain(start: Callable[..., Run]) -> None:
    run = start("api=never_drain", "engine=work", timeout_s=600, grace_s=0.1)
    run.wait_for("ready-never_drain")
    run.wait_for("ready-work")
    run.process.send_signal(signal.SIGTERM)
    run.wait_for("sigterm-never_drain")
    run.process.send_signal(signal.SIGTERM)
    assert run.finish() == 0
    assert_all_gone(run)


def test_requests_that_outlive_the_drain_are_ended(start: Callable[..., Run]) -> None:
    run = start("api=never_drain", "engine=work", timeout_s=0, grace_s=0.1)
    run.wait_for("ready-never_drain")
    run.wait_for("ready-work")
    run.process.send_signal(signal.SIGTERM)
    assert run.finish() == 0
    assert "requests still run after 0 s" in run.errors
    assert_all_gone(run)


def test_a_killed_engine_ends_all_and_the_api_hears_of_it(start: Callable[..., Run]) -> None:
    run = start("api=serve", "engine=work")
    run.wait_for("ready-serve")
    run.wait_for("ready-work")
    (engine,) = pids_of(run, "work")
    os.kill(engine, signal.SIGKILL)
    assert run.finish() == 1
    last = run.errors.splitlines()[-1]
    assert "engine was killed by SIGKILL" in last
    assert "memory" in last
    run.wait_for("engine_lost-serve")
    assert_all_gone(run)


def pids_of(run: Run, behaviour: str) -> set[int]:
    return {pid_of(mark) for mark in run.marks.glob(f"pid-{behaviour}-*")}


def lose(run: Run, behaviour: str, number: signal.Signals, *others: str) -> None:
    """Signal the engine process that lives, and wait for the one that takes its place, and for the other ranks."""
    ranks = (behaviour, *others)
    before = {rank: pids_of(run, rank) for rank in ranks}
    for rank in ranks:
        (run.marks / f"ready-{rank}").unlink()
    (pid,) = filter(is_alive, before[behaviour])
    os.kill(pid, number)
    for rank in ranks:
        wait_until(lambda rank=rank: len(pids_of(run, rank)) > len(before[rank]), f"the next {rank}")
        run.wait_for(f"ready-{rank}")
    wait_until(lambda: not any(map(is_alive, set().union(*before.values()))), "the end of those that were replaced")


def test_all_ranks_of_a_lost_engine_are_started_again_and_the_api_stays(start: Callable[..., Run]) -> None:
    run = start("api=serve", "engine=work", "engine-1=follow", restarts=2)
    for mark in ("ready-serve", "ready-work", "ready-follow"):
        run.wait_for(mark)
    lose(run, "follow", signal.SIGKILL, "work")
    run.wait_for("engine_restarts-serve")
    lose(run, "work", signal.SIGSTOP, "follow")
    assert [len(pids_of(run, behaviour)) for behaviour in ("serve", "work", "follow")] == [1, 3, 3]
    run.process.send_signal(signal.SIGTERM)
    assert run.finish() == 0
    warnings = [line for line in run.errors.splitlines() if "WARNING" in line]
    assert "engine-1 was killed by SIGKILL" in warnings[0] and "(1 of 2) in 0 s" in warnings[0]
    assert "engine was stopped (SIGSTOP)" in warnings[1] and "(2 of 2) in 1 s" in warnings[1]
    assert_all_gone(run)


def test_an_engine_that_is_lost_too_often_ends_all(start: Callable[..., Run]) -> None:
    run = start("api=serve", "engine=work", restarts=1)
    run.wait_for("ready-serve")
    run.wait_for("ready-work")
    lose(run, "work", signal.SIGKILL)
    (pid,) = filter(is_alive, pids_of(run, "work"))
    os.kill(pid, signal.SIGKILL)
    assert run.finish() == 1
    assert "engine was killed by SIGKILL" in run.errors.splitlines()[-1]
    run.wait_for("engine_lost-serve")
    assert_all_gone(run)


def test_an_engine_that_never_served_is_not_started_again(start: Callable[..., Run]) -> None:
    run = start("api=serve", "engine=crash", restarts=5)
    assert run.finish() == 1
    assert len(pids_of(run, "crash")) == 1


def test_of_several_ranks_that_go_together_the_one_with_the_cause_is_named(start: Callable[..., Run]) -> None:
    run = start("api=serve", "engine=lose_ranks", "engine-1=fail")
    assert run.finish() == 1
    assert "start failed: no such model 'x'" in run.errors
    assert_all_gone(run)


def test_a_dead_api_process_ends_the_engine(start: Callable[..., Run]) -> None:
    run = start("api=die_when_told", "engine=work")
    run.wait_for("ready-die_when_told")
    run.wait_for("ready-work")
    (run.marks / "die").touch()
    assert run.finish() == 1
    assert run.errors.splitlines()[-1].endswith("api ended with exit code 3")
    assert_all_gone(run)


def test_a_start_failure_is_one_line_with_the_childs_own_reason(start: Callable[..., Run]) -> None:
    run = start("api=serve", "engine=fail")
    assert run.finish() == 1
    assert next(line for line in run.errors.splitlines() if "ERROR" in line).endswith(
        "start failed: no such model 'x': check --model-id"
    )
    assert "Traceback" not in run.errors
    assert_all_gone(run)


def test_a_child_that_ends_without_a_word_is_named_with_its_exit_code(start: Callable[..., Run]) -> None:
    run = start("api=serve", "engine=crash")
    assert run.finish() == 1
    assert "engine ended with exit code 7" in run.errors


def test_a_stop_signal_while_loading_ends_a_child_that_does_not_listen(start: Callable[..., Run]) -> None:
    run = start("api=serve", "engine=load_forever")
    run.wait_for("ready-serve")
    wait_until(lambda: any(run.marks.glob("pid-load_forever-*")), "the engine")
    run.process.send_signal(signal.SIGTERM)
    assert run.finish() == 0
    assert_all_gone(run)


def test_children_end_by_themselves_when_the_launcher_is_killed(start: Callable[..., Run]) -> None:
    run = start("api=serve", "engine=work")
    run.wait_for("ready-serve")
    run.wait_for("ready-work")
    run.process.kill()
    assert_all_gone(run)
    run.wait_for("orphaned-work")


def test_the_private_folder_is_gone_afterwards(start: Callable[..., Run]) -> None:
    run = start("api=serve", "engine=fail")
    run.finish()
    assert list(run.temp.iterdir()) == []


@pytest.fixture
def child_of(tmp_path: Path) -> Iterator[Callable[[str], Child]]:
    children: list[Child] = []

    def begin(behaviour: str) -> Child:
        spec = ProcessSpec("engine", (sys.executable, str(FAKE_CHILD), behaviour, str(tmp_path)), {})
        roots = [str(REPOSITORY / root) for root in ("launcher", "server")]
        spec.env["PYTHONPATH"] = os.pathsep.join(roots)
        children.append(Child(spec, tmp_path / "serve.json"))
        return children[-1]

    yield begin
    for one in children:
        one.process.kill()
        one.process.wait()
        one.line.close()


def listen_until(one: Child, now: float, is_true: Callable[[], bool]) -> None:
    wait_until(lambda: bool(one.listen(now)) or is_true(), "the child's word")


def test_a_ready_child_that_leaves_a_ping_unanswered_hangs(child_of: Callable[[str], Child]) -> None:
    deaf = child_of("hang")
    listen_until(deaf, 100.0, lambda: deaf.is_ready)
    deaf.ping(100.0 + child.PING_INTERVAL_S)
    asked_at = 100.0 + child.PING_INTERVAL_S
    assert not deaf.is_hung(asked_at + child.PING_TIMEOUT_S - 1)
    assert deaf.is_hung(asked_at + child.PING_TIMEOUT_S + 1)
    assert "hangs" in deaf.why()


def test_a_child_that_is_stopped_hangs_and_one_that_goes_on_does_not(child_of: Callable[[str], Child]) -> None:
    stopped = child_of("work")
    listen_until(stopped, 100.0, lambda: stopped.is_ready)
    assert not stopped.is_hung(100.0)
    stopped.process.send_signal(signal.SIGSTOP)
    wait_until(lambda: psutil.Process(stopped.process.pid).status() == psutil.STATUS_STOPPED, "the stop")
    assert not stopped.is_hung(200.0)
    assert stopped.is_hung(200.0 + child.STOPPED_TIMEOUT_S)
    assert "stopped (SIGSTOP)" in stopped.why()
    stopped.process.send_signal(signal.SIGCONT)
    wait_until(lambda: not stopped.is_hung(300.0), "its going on")


def test_an_engine_that_answers_and_is_at_one_step_for_too_long_hangs(child_of: Callable[[str], Child]) -> None:
    busy = child_of("busy")
    listen_until(busy, 100.0, lambda: busy.is_ready)
    busy.ping(200.0)
    wait_until(lambda: bool(busy.listen(200.0)) or busy.is_hung(200.0), "the pong")
    assert "hangs: one step has taken 31 s" in busy.why()


def test_an_answered_ping_is_a_sign_of_life(child_of: Callable[[str], Child], tmp_path: Path) -> None:
    alive = child_of("work")
    listen_until(alive, 100.0, lambda: alive.is_ready)
    alive.ping(200.0)
    wait_until((tmp_path / "ping-work").exists, "the ping's arrival")
    wait_until(lambda: bool(alive.listen(201.0)) or not alive.is_hung(1000.0), "the pong")


def test_a_loading_child_is_not_asked(child_of: Callable[[str], Child]) -> None:
    loading = child_of("load_forever")
    loading.ping(1e6)
    assert not loading.is_hung(2e6)
