"""One run of bench/gpu.py: its budget, its parts one after the other, and the model that they share."""

import argparse
import faulthandler
import gc
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from gpu_report import Report, Row
from gpu_world import World, make_world, random_adapter, random_model

from loraplex_models.adapters.weights import AdapterWeights
from loraplex_models.decoder import CausalLM

PROMPT_TOKENS = 128
LOST_CONTEXT = 3  # the exit code of a process whose device answers no more


class Bench:
    """One run: the model, the budget, and what was found."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.device = torch.device("cpu" if options.interpret else "cuda")
        self.dtype = torch.float32 if options.interpret else torch.bfloat16
        self.batches = [1, 2] if options.interpret else [1, 8, 32, 64, 128]
        self.counts = [1, 2] if options.interpret else [1, 4, 8, 32, 128]
        self.num_new = 4 if options.interpret else 24
        self.prompt = 6 if options.interpret else PROMPT_TOKENS
        self.long_prompt = 8 if options.interpret else 2048
        self.pinned_bytes = 2**22 if options.interpret else 6 * 2**30  # for 64 adapters of rank 16
        self.began = time.monotonic()
        self.report = Report.read(options.json) if options.resume else Report()
        self.report.host = {
            "device": "Triton's interpreter" if options.interpret else torch.cuda.get_device_name(),
            "torch": torch.__version__, "shape": options.shape,
        }  # fmt: skip
        self.seconds_before = self.report.seconds
        self.deadline = float("inf")
        self._model: CausalLM | None = None
        self._weights: dict[int, AdapterWeights] = {}

    def section(self, name: str, seconds: float, work: Callable[[], Iterable[Row]]) -> None:
        """Run one part if some `seconds` are left for it, and print its table; on no account twice.

        What fails is told with its traceback, and the rows before it are kept. A part that goes on for three times its
        seconds and a minute takes the process with it, and so does one that breaks the device's context.
        """
        report = self.report
        if report.has(name):
            return
        left = self.options.budget - (time.monotonic() - self.began)
        if left < seconds:
            report.left_out[name] = f"needs about {seconds:.0f} s, {left:.0f} s are left"
            return
        report.left_out.pop(name, None)
        report.running = name
        self.write()
        began = time.monotonic()
        if not self.options.interpret:
            self.deadline = began + 1.5 * seconds
            faulthandler.dump_traceback_later(3 * seconds + 60, exit=True)
        try:
            for row in work():
                report.tables.setdefault(name, []).append(row)
                self.write()
        except Exception:  # whatever it is, a lent GPU's other figures are worth having
            report.failed[name] = traceback.format_exc()[-4000:]
            print(f"\n## {name} FAILED\n\n{report.failed[name]}", flush=True)
            self._leave_if_lost()
        finally:
            faulthandler.cancel_dump_traceback_later()
        report.running = None
        self.write()
        _print_table(name, report.tables.get(name, []), time.monotonic() - began)
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _leave_if_lost(self) -> None:
        """End the process when the device's context is broken: nothing can be computed in it any more."""
        if self.device.type != "cuda":
            return
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            self.write()
            sys.stderr.flush()
            os._exit(LOST_CONTEXT)

    def is_late(self, what: str) -> bool:
        """Whether the part that runs has taken its time; then `what` is named as left out."""
        if time.monotonic() < min(self.deadline, self.began + self.options.budget):
            return False
        self.report.left_out[what] = "no time is left"
        return True

    def write(self) -> None:
        """Write what was found until now."""
        self.report.seconds = self.seconds_before + time.monotonic() - self.began
        self.report.write(self.options.json)

    @property
    def model(self) -> CausalLM:
        """The shape with random weights, made when it is first asked for."""
        if self._model is None:
            self._model = random_model(self.options.shape, self.dtype, self.device)
        return self._model

    def forget_model(self) -> None:
        """Give its memory back."""
        self._model = None
        self._weights.clear()

    def adapters(self, ranks: list[int]) -> dict[str, AdapterWeights]:
        """As many adapters, by digest: each with device memory of its own, those of one rank with the same numbers."""
        made: dict[str, AdapterWeights] = {}
        for index, rank in enumerate(ranks):
            if rank not in self._weights:
                self._weights[rank] = random_adapter(self.model.config, self.model, rank, 0)
            made[f"{index}-r{rank}"] = AdapterWeights(f"{index}-r{rank}", rank, self._weights[rank].modules)
        return made

    @contextmanager
    def world(
        self, adapters: dict[str, AdapterWeights], batch: int, *, model: CausalLM | None = None, **changes: Any
    ) -> Iterator[World]:
        """An engine for decodes of up to that batch, over the run's model or another."""
        settings: dict[str, Any] = {
            "max_batch_size": batch, "max_total_tokens": self.prompt + self.num_new + 16,
            "num_slots": max(len(adapters), 1),
            "max_rank": max((weights.rank for weights in adapters.values()), default=8),
        }  # fmt: skip
        world = make_world(model or self.model, adapters, **(settings | changes))
        try:
            yield world
        finally:
            world.engine.close()

    def decode(self, world: World, batch: int, digests: Sequence[str] = ()) -> tuple[float, float]:
        """Median milliseconds of a step in which all rows decode, and tokens a second of the whole work."""
        for _ in range(2):  # the first time compiles, captures, and brings the adapters in
            self.fill(world, batch, digests)
            began = time.perf_counter()
            steps = [(seconds, len(tokens)) for seconds, tokens in world.run()]
            elapsed = time.perf_counter() - began
        full = [seconds for seconds, count in steps[1:] if count == batch] or [seconds for seconds, _ in steps]
        return statistics.median(full) * 1e3, batch * self.num_new / elapsed

    def fill(self, world: World, requests: int, digests: Sequence[str] = ()) -> None:
        """Send so many requests, which take turns with the adapters."""
        for index in range(requests):
            world.add(self.prompt, self.num_new, digests[index % len(digests)] if digests else None)

    def print_end(self) -> None:
        """What was left out, what failed, what is wrong, and how long all took."""
        for name, why in self.report.left_out.items():
            print(f"left out: {name}: {why}")
        for name, error in self.report.failed.items():
            print(f"FAILED: {name}: {error.strip().splitlines()[-1]}")
        for name in self.report.wrong():
            print(f"WRONG: {name}")
        print(f"{self.report.seconds:.0f} s in all; figures in {self.options.json}", flush=True)


def _print_table(name: str, rows: list[Row], seconds: float) -> None:
    print(f"\n## {name} ({seconds:.0f} s)\n")
    if rows:
        titles = list(rows[0])
        print("| " + " | ".join(titles) + " |\n|" + "---|" * len(titles))
        for row in rows:
            cells = (row.get(title) for title in titles)
            print("| " + " | ".join(f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in cells) + " |")
    sys.stdout.flush()
