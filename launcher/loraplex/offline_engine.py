"""The engine in the caller's own process, stepped by the caller: what `LLM` runs on."""

import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Set
from concurrent.futures import Future, wait
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loraplex.completion import OpenCompletion
from loraplex.flags import Settings, openmp_variables
from loraplex.gpus import find_gpus
from loraplex.launch_error import LaunchError
from loraplex.offline_ranks import OfflineRanks
from loraplex.plan import check_served, make_plan
from loraplex.resolve import resolve
from loraplex_server.errors import GenerationFailed
from loraplex_server.machine import look_at_machine
from loraplex_server.messages import AdapterSpec, GenerateRequest
from loraplex_server.text.guides import Guide

if TYPE_CHECKING:
    from loraplex_models.parallel import ParallelGroup

# How often it is asked whether a rank that does not come to the meeting has failed.
MEETING_INTERVAL_S = 0.2
# How long whoever watches the other ranks may take to say why one was lost.
LOSS_TIMEOUT_S = 2.0
# How long to sleep when every sequence waits for an adapter that a thread is still reading.
LOADING_WAIT_S = 0.002
# Sequences given to the engine at a time, in batches: enough that it always finds a next one, few enough to look over.
BATCHES_AHEAD = 2


@dataclass(frozen=True, slots=True, eq=False)
class Job:
    """One sequence to be generated, and the place its tokens go to."""

    request: GenerateRequest
    adapter: AdapterSpec | None
    completion: OpenCompletion


class OfflineEngine:
    """Model, adapters and engine of this process, and of those that have the other ranks. One thread at a time may use
    it.

    Raises LaunchError when the model cannot be served.
    """

    def __init__(self, settings: Settings):
        check_served(settings)
        facts = resolve(settings, progress=True)
        plan = make_plan(settings, facts, look_at_machine(), openmp_set=openmp_variables(), gpus=find_gpus())
        wanted_threads = settings.serve.engine.num_threads
        if "torch" not in sys.modules:
            # OpenMP reads them once, when torch is imported; a caller who was first has his own.
            os.environ |= next(process.env for process in plan.processes if process.name == "engine")
        # Heavy, and OpenMP's settings come before it.
        import torch

        from loraplex_models.checkpoint import CheckpointError
        from loraplex_models.parallel import RanksLost
        from loraplex_server.engine.device import DeviceError
        from loraplex_server.engine.memory import NotEnoughMemory, settle_group_limits
        from loraplex_server.engine.process import build_engine, load_base_model
        from loraplex_server.engine.profile import free_kv_bytes

        if wanted_threads:
            torch.set_num_threads(wanted_threads)
        self.config = plan.config.engine
        self._ranks_lost: type[Exception] = RanksLost
        self._ranks = OfflineRanks(plan)
        try:
            model = load_base_model(self.config, group=self._meet())
            self.limits = settle_group_limits(self.config, model, free_kv_bytes(self.config, model))
        except RanksLost as error:
            why = self._ranks.loss(LOSS_TIMEOUT_S)
            self._ranks.close()
            raise LaunchError(why or str(error)) from None
        except (CheckpointError, NotEnoughMemory, DeviceError) as error:
            self._ranks.close()
            raise LaunchError(str(error)) from None
        except BaseException:
            self._ranks.close()
            raise
        self.model_config = facts.config  # of the whole model
        self._engine = build_engine(self.config, model, self.limits)
        self._waiting: deque[Job] = deque()
        self._running: dict[str, Job] = {}

    def run(self, jobs: Iterable[Job], on_end: Callable[[Job], object]) -> None:
        """Generate all sequences, and tell of each that has ended; when it is interrupted none goes on."""
        for job in jobs:
            self.submit(job)
        try:
            while self.has_work:
                for job in self.step():
                    on_end(job)
        finally:
            self.cancel({job.request.request_id for job in self._waiting} | self._running.keys())

    def submit(self, job: Job) -> None:
        """Let a sequence begin with one of the next steps."""
        self._waiting.append(job)

    @property
    def has_work(self) -> bool:
        """Whether a sequence has not ended."""
        return bool(self._waiting or self._running)

    def step(self) -> list[Job]:
        """One step of the engine; returns the sequences that have ended with it."""
        while self._waiting and len(self._running) < BATCHES_AHEAD * self.config.max_batch_size:
            job = self._waiting.popleft()
            self._running[job.request.request_id] = job
            self._add(job)
        try:
            step = self._engine.step()
        except self._ranks_lost as error:
            why = self._ranks.loss(LOSS_TIMEOUT_S)
            raise GenerationFailed(f"the engine is lost: {why or error}; make another LLM") from None
        if step is None:
            if self._engine.is_idle:
                time.sleep(LOADING_WAIT_S)
            return []
        ended: list[Job] = []
        for output in step.outputs:
            running = self._running.get(output.request_id)
            if running is None or not running.completion.feed(output):
                continue
            del self._running[output.request_id]
            if output.finish_reason is None:  # a stop string ended it, of which the engine knows nothing
                self._engine.abort(output.request_id)
            ended.append(running)
        return ended

    def cancel(self, request_ids: Set[str]) -> None:
        """Let these sequences go on no more."""
        self._waiting = deque(job for job in self._waiting if job.request.request_id not in request_ids)
        for request_id in self._running.keys() & request_ids:
            del self._running[request_id]
            self._engine.abort(request_id)

    def grammar_of(self, guide: Guide) -> str:
        """The grammar of a guide, compiled. Raises ValueError for one that does not compile, or matches nothing."""
        # Native code, wanted by few.
        from loraplex_server.text.guide_compiler import GuideError, grammar_of

        try:
            grammar = grammar_of(guide)
            error = self._engine.grammar_error(grammar)
        except GuideError as problem:
            error = str(problem)
        if error is not None:
            raise ValueError(f"structured_outputs: {error}")
        return grammar

    def close(self) -> None:
        """End the threads that read adapters, and the other ranks."""
        self._engine.close()
        self._ranks.close()

    def _meet(self) -> "ParallelGroup":
        """Meet the other ranks, which may fail before they come to it: then their loss ends the waiting."""
        from loraplex_models.parallel import ParallelGroup, RanksLost  # as above
        from loraplex_server.engine.device import rank_device

        if self.config.num_ranks == 1:
            return ParallelGroup.single()
        met: Future[ParallelGroup] = Future()

        def join() -> None:
            try:
                met.set_result(ParallelGroup.join(0, self.config.num_ranks, self._ranks.rendezvous, device))
            except RanksLost as error:
                met.set_exception(error)

        device = rank_device(self.config, 0)
        threading.Thread(target=join, daemon=True).start()
        while not wait([met], MEETING_INTERVAL_S).done:
            if (why := self._ranks.loss()) is not None:
                raise RanksLost(why)
        return met.result()

    def _add(self, job: Job) -> None:
        if job.adapter is not None:
            self._engine.load_adapter(job.adapter)
        self._engine.add(job.request)
