"""A server as a person starts it: the launcher in a process of its own, real children, a real port."""

import contextlib
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import psutil

REPOSITORY = Path(__file__).parents[1]
ROOTS = ("launcher", "server", "models", "quant", "kernels")
START_S = 300  # kernels may have to be compiled, beside other work
EXIT_S = 120
ANSWER_S = 180
# Below those that the system gives to clients, so that none takes a port before its server does; processes that choose
# at the same time begin in different places.
PORTS = itertools.cycle(range(20_000 + os.getpid() * 37 % 10_000, 32_000))
# The text that SmolLM2's chat template makes of one question.
CHAT = (
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)
GAUGES = ("loraplex_running", "loraplex_waiting", "loraplex_kv_blocks_used", "loraplex_adapter_pins")


def free_port() -> int:
    """A port of the loopback that nobody listens on, and that was not given before."""
    for port in PORTS:
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
    raise AssertionError("ports do not end")


def environment() -> dict[str, str]:
    """This process's environment, with the source roots, so that no installation is needed."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(str(REPOSITORY / root) for root in ROOTS)}


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and waits for its parent to notice does not."""
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def wait_until(is_true: Callable[[], bool], what: str, timeout_s: float = START_S) -> None:
    """Look again and again; fails when `timeout_s` has passed."""
    deadline = time.monotonic() + timeout_s
    while not is_true():
        assert time.monotonic() < deadline, f"never came: {what}"
        time.sleep(0.02)


def events_of(stream: str) -> list[dict[str, Any]]:
    """The events of a stream that was read to its end; comments keep one alive that has to wait."""
    return [json.loads(line.removeprefix("data:")) for line in stream.split("\n") if line.startswith("data:")]


class LaunchedServer:
    """`python -m loraplex` with `args` on a free port; what it says goes to the file `log`."""

    def __init__(self, log: Path, *args: str):
        self._log = log
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        with log.open("w") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "loraplex", *args, "--hostname", "127.0.0.1", "--port", str(self.port)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=environment(),
            )
        self.pids: dict[str, int] = {}

    def wait_ready(self) -> "LaunchedServer":
        """Wait for the line that says so, and note the children's pids."""
        ready = f"ready on {self.url}"
        wait_until(lambda: ready in self.said or self.process.poll() is not None, f"{ready} in {self.said}")
        assert self.process.poll() is None, self.said
        self.note_pids()
        assert {"api", "engine"} <= set(self.pids)
        return self

    def note_pids(self) -> None:
        """Note the children that there are: api, engine, and by their rank engine-1 and so on."""
        self.pids = {}
        for child in psutil.Process(self.process.pid).children(recursive=True):
            arguments = child.cmdline()
            if "loraplex.processes" in arguments:
                name = arguments[arguments.index("loraplex.processes") + 1]
                rank = int(arguments[arguments.index("--rank") + 1]) if "--rank" in arguments else 0
                self.pids[f"{name}-{rank}" if rank else name] = child.pid

    @property
    def said(self) -> str:
        """All that the launcher and its children have said so far."""
        return self._log.read_text()

    def kill(self, name: str) -> None:
        """End a child as the system does when memory runs out."""
        self.send_signal(name, signal.SIGKILL)

    def send_signal(self, name: str, number: signal.Signals) -> None:
        """Signal one child."""
        os.kill(self.pids[name], number)

    def wait(self, timeout_s: float = EXIT_S) -> int:
        """The launcher's exit code; all its children are gone by then."""
        code = self.process.wait(timeout_s)
        assert [name for name, pid in self.pids.items() if is_alive(pid)] == [], self.said
        return code

    def stop(self) -> int:
        """Ask it to end, and wait for that."""
        self.process.send_signal(signal.SIGTERM)
        return self.wait()

    def end_by_force(self) -> None:
        """Leave nothing behind, whatever has happened."""
        if self.process.poll() is None:
            for child in psutil.Process(self.process.pid).children(recursive=True):
                child.kill()
            self.process.kill()
            self.process.wait()
        for pid in self.pids.values():
            if is_alive(pid):
                os.kill(pid, signal.SIGKILL)

    def gauges(self) -> dict[str, float]:
        """What is in use now, as /metrics says."""
        lines = httpx.get(f"{self.url}/metrics", timeout=ANSWER_S).text.splitlines()
        series = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
        return {name: float(series[name]) for name in GAUGES}
