"""Run a StepPlan on all ranks. Launch and collect are two calls: another step may be launched between them."""

from collections import deque
from typing import Protocol

from loraplex_server.engine.adapters.host_cache import FinishedLoad
from loraplex_server.engine.step import StepPlan
from loraplex_server.engine.worker import LaunchedStep, StepResult, Worker


class Executor(Protocol):
    """What the engine needs of its ranks."""

    def launch(self, plan: StepPlan) -> None:
        """Start a step on every rank."""

    def collect(self) -> StepResult:
        """Wait for the result of the step launched first of those that were not collected."""

    def finished_loads(self) -> list[FinishedLoad]:
        """Loads of adapters, into host memory or onto the device, that ended since the last call; never waits."""

    def close(self) -> None:
        """Stop the ranks."""


class LocalExecutor:
    """One rank, in this process. On a CPU launch computes, and collect hands over."""

    def __init__(self, worker: Worker):
        self._worker = worker
        self._launched: deque[LaunchedStep] = deque()

    def launch(self, plan: StepPlan) -> None:
        """Begin the step."""
        self._launched.append(self._worker.launch(plan))

    def collect(self) -> StepResult:
        """The step's result."""
        return self._launched.popleft().read()

    def finished_loads(self) -> list[FinishedLoad]:
        """Loads of adapters that ended since the last call."""
        return self._worker.host_cache.finished()

    def close(self) -> None:
        """Stop the worker's threads."""
        self._worker.host_cache.close()
