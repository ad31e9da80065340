"""Start the children, wait until they are ready, watch them, start a lost engine again, and stop them in order.

Signal handlers only note the signal; the loop acts. Whatever ends the loop, no child outlives `run`. The ranks of an
engine live and die together; the API process outlives them.
"""

import dataclasses
import selectors
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import msgspec

from loraplex.child import Child
from loraplex.console import Console
from loraplex.plan import LaunchPlan, ProcessSpec
from loraplex.private_folder import private_folder
from loraplex.restarts import Restarts

# The loop looks at clocks and processes this often, also when nobody says anything.
TICK_S = 0.5
# How long a rank that ends because others have waits to be blamed: the one with the cause is about to be seen.
CAUSE_GRACE_S = 1.0
# How long a child may take to go after it was told to, beyond any time that the plan grants it.
STOP_GRACE_S = 3.0
# The same for a child that is busy loading and would not hear.
SHORT_GRACE_S = 0.3
# The same for a child that has hung up already and takes its time to end: its exit code is worth waiting for.
HANG_UP_GRACE_S = 1.0
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Supervisor:
    """One run of a plan: `run` returns the launcher's exit code."""

    def __init__(self, plan: LaunchPlan, console: Console):
        self._plan = plan
        self._console = console
        self._children: list[Child] = []
        self._restarts = Restarts(plan.max_engine_restarts)
        self._num_starts = 0  # of the engine
        self._lost_at: float | None = None  # until the engine is ready again
        self._start_at: float | None = None  # when a lost engine is to be started again
        self._signals: list[int] = []
        self._selector = selectors.DefaultSelector()
        self._wake_up, self._waker = socket.socketpair()

    def run(self) -> int:
        """Serve until a signal (0), or the death of a child that is not started again (1)."""
        with private_folder() as folder, self._noting_signals():
            try:
                self._start([spec for spec in self._plan.processes if spec.rank is None], folder)
                self._start_engine(folder)
                return self._watch(folder)
            finally:
                self._end_all()

    def _start_engine(self, folder: Path) -> None:
        self._num_starts += 1
        self._start_at = None
        self._start([spec for spec in self._plan.processes if spec.rank is not None], folder)

    def _start(self, specs: list[ProcessSpec], folder: Path) -> None:
        config = dataclasses.replace(self._plan.config, link_address=str(folder), rendezvous=self._rendezvous(folder))
        config_file = folder / "serve.json"
        # A file in a folder of our own, and not an argument: the configuration holds API keys.
        config_file.write_bytes(msgspec.json.encode(config))
        for spec in specs:
            child = Child(spec, config_file)
            self._children.append(child)
            self._selector.register(child.line, selectors.EVENT_READ)

    def _rendezvous(self, folder: Path) -> str:
        if self._plan.config.engine.num_ranks == 1:
            return ""
        # Each start has its own: a file still knows the ranks that have gone.
        return self._plan.meeting_point or f"file://{folder / f'ranks-{self._num_starts}'}"

    def _watch(self, folder: Path) -> int:
        has_served = False
        while not self._signals:
            self._wait(TICK_S)
            if lost := self._first_lost():
                if not (has_served and lost.is_engine and self._give_up_engine(lost)):
                    return self._end_after_loss(lost)
            elif self._start_at is not None:
                if time.monotonic() >= self._start_at:
                    self._start_engine(folder)
            elif all(child.is_ready for child in self._children):
                if not has_served:
                    has_served = True
                    self._restarts.ready(time.monotonic())
                    self._console.line(f"ready on {self._url()}" if self._apis() else "ready")
                elif self._lost_at is not None:
                    self._restarts.ready(time.monotonic())
                    self._console.line(f"the engine is ready again after {time.monotonic() - self._lost_at:.1f} s")
                    self._lost_at = None
        return self._drain()

    def _apis(self) -> list[Child]:
        return [child for child in self._children if not child.is_engine]

    def _give_up_engine(self, lost: Child) -> bool:
        """End all ranks of a lost engine, and plan its next start; False when it has been lost too often."""
        now = time.monotonic()
        delay_s = self._restarts.delay_s(now)
        if delay_s is None:
            return False
        for api in self._apis():
            api.line.send("engine_restarts")
        self._lost_at = self._lost_at or now
        self._start_at = now + delay_s
        if lost.has_ended:
            _wait_for_exit(lost, HANG_UP_GRACE_S)
        times = f"{self._restarts.num_in_a_row} of {self._restarts.limit}"
        self._console.end_progress()
        self._console.warning(f"lost: {lost.why()}; starting the engine again ({times}) in {delay_s:.0f} s")
        self._kill_engine()
        return True

    def _kill_engine(self) -> None:
        """End all ranks by force: they wait for each other where no word reaches them."""
        for child in [child for child in self._children if child.is_engine]:
            child.send_signal(signal.SIGKILL)
            child.process.wait()
            self._forget(child)
            self._children.remove(child)

    def _forget(self, child: Child) -> None:
        if child.line.fileno() in self._selector.get_map():
            self._selector.unregister(child.line)
        child.line.close()

    def _wait(self, timeout_s: float) -> None:
        """Listen to all children until something is said, and ask the silent ones for a sign of life."""
        for key, _ in self._selector.select(timeout_s):
            if key.fileobj is self._wake_up:
                self._wake_up.recv(64)  # only the waking matters; the handler has noted the signal
        now = time.monotonic()
        for child in self._children:
            for event in child.listen(now):
                self._show(event)
            child.ping(now)
            if child.line.is_closed and child.line.fileno() in self._selector.get_map():
                self._selector.unregister(child.line)

    def _show(self, event: dict[str, object]) -> None:
        match event:
            case {"event": "progress", "phase": str(phase), "done": int(done), "total": int(total)}:
                self._console.progress(phase, done, total)
            case {"event": "ready", "report": list(report)}:
                self._console.end_progress()
                for line in report:
                    self._console.line(str(line))

    def _first_lost(self) -> Child | None:
        lost = self._most_telling_loss()
        deadline = time.monotonic() + CAUSE_GRACE_S
        while lost is not None and lost.has_lost_ranks and time.monotonic() < deadline:
            self._wait(TICK_S)  # for the rank that it has lost
            lost = self._most_telling_loss()
        return lost

    def _most_telling_loss(self) -> Child | None:
        """A child that has gone; if several went together, the one with a reason of its own."""
        now = time.monotonic()
        lost = [child for child in self._children if child.has_ended or child.is_hung(now)]
        return min(lost, key=lambda child: (child.has_lost_ranks, child.failure is None), default=None)

    def _end_after_loss(self, lost: Child) -> int:
        """A child is gone: tell the API process, so that clients get their errors, and stop the rest."""
        self._console.end_progress()
        if lost.has_ended:
            _wait_for_exit(lost, HANG_UP_GRACE_S)
        was_serving = all(child.is_ready for child in self._children)
        why = lost.why()
        for api in self._apis():
            if api is not lost:
                api.line.send("engine_lost")
        if lost.is_engine:
            self._kill_engine()
        self._end_all()
        self._console.error(f"stopped: {why}" if was_serving else f"start failed: {why}")
        return 1

    def _drain(self) -> int:
        """A stop was asked for: the API process finishes its requests, then the others go; a second signal cuts it."""
        self._console.end_progress()
        timeout_s = self._plan.config.api.graceful_termination_timeout
        apis = self._apis()
        self._console.line("stopping: no new requests; a second signal ends the running ones too")
        num_signals = len(self._signals)
        deadline = time.monotonic() + timeout_s + STOP_GRACE_S
        for child in apis:
            child.send_signal(signal.SIGTERM)
        while any(child.process.poll() is None for child in apis):
            self._wait(TICK_S)
            if len(self._signals) > num_signals:
                self._console.line("second signal: ending at once")
                break
            if time.monotonic() > deadline:
                self._console.warning(f"requests still run after {timeout_s} s: ending them")
                break
            now = time.monotonic()
            if lost := next((c for c in self._children if c not in apis and (c.has_ended or c.is_hung(now))), None):
                return self._end_after_loss(lost)
        self._end_all()
        self._console.line("stopped")
        return 0

    def _end_all(self) -> None:
        """Stop what still runs, the API process first: politely where it can listen, then by force."""
        for child in self._children:
            child.send_signal(signal.SIGTERM)
            child.line.send("stop")  # wakes a child that sleeps until its line says something
            can_listen = child.is_ready and not child.is_hung(time.monotonic())
            _wait_for_exit(child, STOP_GRACE_S if can_listen else SHORT_GRACE_S)
            child.send_signal(signal.SIGKILL)
        for child in self._children:
            child.process.wait()
            self._forget(child)
        self._children.clear()

    def _url(self) -> str:
        api = self._plan.config.api
        host = "127.0.0.1" if api.hostname == "0.0.0.0" else api.hostname
        return f"http://[{host}]:{api.port}" if ":" in host else f"http://{host}:{api.port}"

    @contextmanager
    def _noting_signals(self) -> Iterator[None]:
        """Note every stop signal, and wake the loop by it."""
        for end in (self._wake_up, self._waker):
            end.setblocking(False)

        def note(number: int, frame: FrameType | None) -> None:
            self._signals.append(number)

        before = {number: signal.signal(number, note) for number in STOP_SIGNALS}
        fd_before = signal.set_wakeup_fd(self._waker.fileno(), warn_on_full_buffer=False)
        self._selector.register(self._wake_up, selectors.EVENT_READ)
        try:
            yield
        finally:
            signal.set_wakeup_fd(fd_before)
            for number, handler in before.items():
                signal.signal(number, handler)
            self._selector.close()
            self._wake_up.close()
            self._waker.close()


def _wait_for_exit(child: Child, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while child.process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
