"""One child of the supervisor: its process, its control line, and whether it still answers."""

import os
import signal
import socket
import subprocess
from pathlib import Path
from typing import Any

import psutil

from loraplex.plan import ProcessSpec
from loraplex_server.control import ControlLine

PING_INTERVAL_S = 5.0
# A child that is ready and leaves a ping unanswered for so long hangs, and so does an engine that says that it has been
# at one step for so long.
PING_TIMEOUT_S = 30.0
# A child that somebody has stopped (SIGSTOP) for so long is as good as gone: the others wait for it.
STOPPED_TIMEOUT_S = 1.0


class Child:
    """A started process and what it has said."""

    def __init__(self, spec: ProcessSpec, config_file: Path):
        self.name = spec.name
        self.is_engine = spec.rank is not None
        self.is_ready = False
        self.has_lost_ranks = False  # it ends because others have
        self.failure: str | None = None  # its own word on why it fails
        self._pinged_at: float | None = None
        self._answered_at = 0.0
        self._at_work_s = 0.0  # how long its step had been running when it answered last
        self._stopped_at: float | None = None
        ours, theirs = socket.socketpair()
        with theirs:
            fd = theirs.fileno()
            self.process = subprocess.Popen(
                [*spec.argv, "--config", str(config_file), "--control", str(fd)],
                env={**os.environ, **spec.env},
                stdin=subprocess.DEVNULL,
                pass_fds=(fd,),
                # Its own group: Ctrl-C reaches the launcher alone, which then stops the children in order.
                process_group=0,
            )
        self.line = ControlLine(ours)
        self._process = psutil.Process(self.process.pid)

    def listen(self, now: float) -> list[dict[str, Any]]:
        """Take in what the child has said; returns the events that are news to the supervisor."""
        news = []
        for event in self.line.receive():
            match event:
                case {"event": "pong"}:
                    self._pinged_at = None
                    self._answered_at = now
                    self._at_work_s = float(event.get("at_work_s", 0.0))
                case {"event": "ready"}:
                    self.is_ready = True
                    self._answered_at = now
                    news.append(event)
                case {"event": "failed", "error": error}:
                    self.failure = str(error)
                case {"event": "ranks_lost"}:
                    self.has_lost_ranks = True
                case _:
                    news.append(event)
        return news

    @property
    def has_ended(self) -> bool:
        """Whether the process is gone, or has hung up and so is about to be."""
        return self.line.is_closed or self.process.poll() is not None

    def ping(self, now: float) -> None:
        """Ask for a sign of life when the last one is old; before ready nothing is asked, loading may take its time."""
        if self.is_ready and self._pinged_at is None and now - self._answered_at >= PING_INTERVAL_S:
            self._pinged_at = now
            self.line.send("ping")

    def is_hung(self, now: float) -> bool:
        """Whether a ping has stood unanswered for too long, or a step takes too long, or the process is stopped."""
        if self._pinged_at is not None and now - self._pinged_at > PING_TIMEOUT_S:
            return True
        return self._at_work_s > PING_TIMEOUT_S or self._is_stopped(now)

    def _is_stopped(self, now: float) -> bool:
        try:
            is_stopped = self._process.status() == psutil.STATUS_STOPPED
        except psutil.NoSuchProcess:
            is_stopped = False
        if not is_stopped:
            self._stopped_at = None
        elif self._stopped_at is None:
            self._stopped_at = now
        return self._stopped_at is not None and now - self._stopped_at >= STOPPED_TIMEOUT_S

    def send_signal(self, number: signal.Signals) -> None:
        """Signal the child and whatever it has started; nothing happens when it is gone."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, number)

    def why(self) -> str:
        """How it ended, in words, once it has."""
        if self.failure:
            return self.failure
        code = self.process.returncode
        if code is None and self._stopped_at is not None:
            return f"{self.name} was stopped (SIGSTOP) and did not go on"
        if code is None and self._at_work_s > PING_TIMEOUT_S:
            return f"{self.name} hangs: one step has taken {self._at_work_s:.0f} s"
        if code is None and self.line.is_closed:
            return f"{self.name} has hung up without ending"
        if code is None:
            return f"{self.name} hangs: no answer for {PING_TIMEOUT_S:.0f} s"
        if code == -signal.SIGKILL:
            return (
                f"{self.name} was killed by SIGKILL: if nobody did this by hand, memory ran out (the machine's or the "
                "container's): give it more, or lower --kv-memory-fraction, --num-kv-blocks or --adapter-host-memory"
            )
        if code < 0:
            return f"{self.name} was killed by {signal.Signals(-code).name}"
        return f"{self.name} ended with exit code {code}"
