"""The other ranks of an engine whose rank 0 is the caller's own process: started, watched, and ended with it."""

import dataclasses
import signal
import threading
import time
from concurrent.futures import Future, wait
from contextlib import ExitStack

import msgspec

from loraplex.child import Child
from loraplex.plan import LaunchPlan
from loraplex.private_folder import private_folder

WATCH_INTERVAL_S = 0.25
# How long ranks may take to end after they were told to, and a lost one to show how it ended.
STOP_GRACE_S = 3.0


class OfflineRanks:
    """Ranks 1 and up, as processes; `rendezvous` is where rank 0 meets them. With one rank there are none.

    When one of them is lost all are ended, so that rank 0 never waits for them.
    """

    def __init__(self, plan: LaunchPlan):
        self.rendezvous = ""
        self._loss: Future[str] = Future()  # why the first was lost
        self._children: list[Child] = []
        self._is_closing = threading.Event()
        self._folder = ExitStack()
        self._watcher = threading.Thread(target=self._watch, name="rank-watcher", daemon=True)
        specs = [spec for spec in plan.processes if spec.rank]
        if not specs:
            return
        folder = self._folder.enter_context(private_folder())
        self.rendezvous = f"file://{folder / 'ranks'}"
        config_file = folder / "serve.json"
        config = dataclasses.replace(plan.config, link_address=str(folder), rendezvous=self.rendezvous)
        config_file.write_bytes(msgspec.json.encode(config))
        self._children = [Child(spec, config_file) for spec in specs]
        self._watcher.start()

    def loss(self, timeout_s: float = 0.0) -> str | None:
        """Why one was lost; None when none was, also not within `timeout_s`."""
        return self._loss.result() if wait([self._loss], timeout_s).done else None

    def close(self) -> None:
        """Wait for them to end, who know already that nothing more comes; by force if they take too long."""
        self._is_closing.set()
        if self._watcher.is_alive():
            self._watcher.join()
        deadline = time.monotonic() + STOP_GRACE_S
        while any(child.process.poll() is None for child in self._children) and time.monotonic() < deadline:
            time.sleep(0.01)
        self._end()
        self._folder.close()

    def _watch(self) -> None:
        while not self._is_closing.wait(WATCH_INTERVAL_S):
            now = time.monotonic()
            for child in self._children:
                child.listen(now)
                child.ping(now)
            lost = [child for child in self._children if child.has_ended or child.is_hung(now)]
            if lost:
                first = min(lost, key=lambda child: (child.has_lost_ranks, child.failure is None))
                if first.has_ended:
                    first.process.wait()
                why = first.why()
                self._end()
                self._loss.set_result(why)
                return

    def _end(self) -> None:
        for child in self._children:
            child.send_signal(signal.SIGKILL)
            child.process.wait()
            child.line.close()
