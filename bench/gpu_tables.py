"""The tables of bench/gpu.py: what is measured, in which order, and what becomes of a part that fails."""

import argparse
import gc
import json
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from gpu_checks import check_engine, check_graphs, check_kernels
from gpu_prefill import prefill_forms
from gpu_world import World, make_world, random_adapter, random_model

from loraplex_kernels import dispatch
from loraplex_models.adapters.weights import AdapterWeights
from loraplex_models.decoder import CausalLM
from loraplex_server.engine import forward_pass
from loraplex_server.engine.graphs import run_again

PROMPT_TOKENS = 128
MIXED_RANKS = {8: 16, 16: 8, 32: 5, 64: 3}  # adapters of each rank among 32 rows
Row = dict[str, Any]


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
        self.tables: dict[str, list[Row]] = {}
        self.left_out: list[str] = []
        self.failed: dict[str, str] = {}
        self.deadline = float("inf")
        self.model: CausalLM | None = None
        self.weights: dict[tuple[int, int], AdapterWeights] = {}

    def section(self, name: str, seconds: float, work: Callable[[], list[Row]]) -> None:
        """Run one part if some `seconds` are left for it, and print its table."""
        left = self.options.budget - (time.monotonic() - self.began)
        if left < seconds:
            self.left_out.append(f"{name} (needs about {seconds:.0f} s, {left:.0f} s are left)")
            return
        began = time.monotonic()
        self.deadline = began + 1.5 * seconds
        try:
            self.tables[name] = work()
            _print_table(name, self.tables[name], time.monotonic() - began)
        except Exception as error:  # whatever it is, a lent GPU's other figures are worth having
            self.failed[name] = f"{type(error).__name__}: {error}"
            print(f"\n## {name} FAILED\n\n{traceback.format_exc()}", flush=True)
        finally:
            self.write()
            gc.collect()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def is_late(self, what: str) -> bool:
        """Whether the part that runs has taken its time; then `what` is named as left out."""
        if time.monotonic() < min(self.deadline, self.began + self.options.budget):
            return False
        self.left_out.append(f"{what}: no time is left")
        return True

    def write(self) -> None:
        """Write what was found until now."""
        device = torch.cuda.get_device_name() if self.device.type == "cuda" else "Triton's interpreter"
        report = {
            "device": device, "torch": torch.__version__, "shape": self.options.shape, "wrong": self.wrong(),
            "seconds": time.monotonic() - self.began, "failed": self.failed, "left_out": self.left_out,
            "tables": self.tables,
        }  # fmt: skip
        self.options.json.write_text(json.dumps(report, indent=1))

    def wrong(self) -> list[str]:
        """The checks that found a difference."""
        return [name for name, rows in self.tables.items() if any(row.get("ok") is False for row in rows)]

    def adapters(self, ranks: list[int]) -> dict[str, AdapterWeights]:
        """As many adapters, by digest: each with device memory of its own, those of one rank with the same numbers."""
        assert self.model is not None
        made: dict[str, AdapterWeights] = {}
        for index, rank in enumerate(ranks):
            if (rank, 0) not in self.weights:
                self.weights[rank, 0] = random_adapter(self.model.config, self.model, rank, 0)
            made[f"{index}-r{rank}"] = AdapterWeights(f"{index}-r{rank}", rank, self.weights[rank, 0].modules)
        return made

    def world(self, adapters: dict[str, AdapterWeights], batch: int, **changes: Any) -> World:
        """An engine for decodes of that batch."""
        assert self.model is not None
        settings: dict[str, Any] = {
            "max_batch_size": batch, "max_total_tokens": self.prompt + self.num_new + 16,
            "num_slots": max(len(adapters), 1),
            "max_rank": max((weights.rank for weights in adapters.values()), default=8),
        }  # fmt: skip
        return make_world(self.model, adapters, **(settings | changes))

    def decode(self, batch: int, adapters: dict[str, AdapterWeights], **changes: Any) -> tuple[float, float]:
        """Median milliseconds of a step in which all rows decode, and tokens a second of the whole work."""
        world = self.world(adapters, batch, **changes)
        try:
            digests: list[str | None] = [*adapters] or [None]
            for _ in range(2):  # the first time compiles, captures, and brings the adapters in
                for row in range(batch):
                    world.add(self.prompt, self.num_new, digests[row % len(digests)])
                began = time.perf_counter()
                steps = [(seconds, len(tokens)) for seconds, tokens in world.run()]
                elapsed = time.perf_counter() - began
            full = [seconds for seconds, count in steps[1:] if count == batch] or [seconds for seconds, _ in steps]
            return statistics.median(full) * 1e3, batch * self.num_new / elapsed
        finally:
            world.engine.close()


def base_decode(bench: Bench) -> list[Row]:
    """Decode without adapters beside the products alone."""
    rows = []
    for batch in bench.batches:
        if bench.is_late(f"base, batch {batch}"):
            continue
        step_ms, tokens_s = bench.decode(batch, {})
        rows.append({"batch": batch, "GEMMs ms": gemm_floor(bench, batch), "step ms": step_ms, "tokens/s": tokens_s})
    return rows


def lora_decode(bench: Bench, rank: int, batches: list[int]) -> list[Row]:
    """Decode with n distinct adapters of one rank."""
    base = {row["batch"]: row["step ms"] for row in bench.tables.get("decode, base", [])}
    rows = []
    for batch in batches:
        for count in [count for count in bench.counts if count <= batch]:
            if bench.is_late(f"rank {rank}, batch {batch}, {count} adapters"):
                continue
            step_ms, tokens_s = bench.decode(batch, bench.adapters([rank] * count))
            rows.append(
                {
                    "batch": batch, "adapters": count, "step ms": step_ms, "tokens/s": tokens_s,
                    "over base %": _over(step_ms, base.get(batch)),
                }
            )  # fmt: skip
    return rows


def mixed_ranks(bench: Bench) -> list[Row]:
    """32 rows with 32 adapters of ranks 8 to 64."""
    ranks = [3, 8, 17] if bench.options.interpret else [r for r, count in MIXED_RANKS.items() for _ in range(count)]
    base_ms, _ = bench.decode(len(ranks), {})
    step_ms, tokens_s = bench.decode(len(ranks), bench.adapters(ranks))
    return [
        {
            "rows": len(ranks),
            "base ms": base_ms,
            "step ms": step_ms,
            "added ms": step_ms - base_ms,
            "tokens/s": tokens_s,
        }
    ]


def beyond_the_pool(bench: Bench) -> list[Row]:
    """64 requests over n adapters of rank 16 with room for 8 on the device."""
    requests, slots, rank = (6, 2, 4) if bench.options.interpret else (64, 8, 16)
    counts = (0, 2, 6) if bench.options.interpret else (0, 1, 8, 16, 64)
    rows: list[Row] = []
    for count in counts:
        if bench.is_late(f"{count} adapters over {slots} slots"):
            continue
        adapters = bench.adapters([rank] * count)
        world = bench.world(adapters, requests, num_slots=slots, pinned_bytes=bench.pinned_bytes)
        try:
            digests: list[str | None] = [*adapters] or [None]
            for index in range(requests):
                world.add(bench.prompt, bench.num_new, digests[index % len(digests)])
            began = time.perf_counter()
            world.answers()
            speed = requests * bench.num_new / (time.perf_counter() - began)
        finally:
            world.engine.close()
        share = speed / rows[0]["tokens/s"] if rows else 1.0
        rows.append({"requests": requests, "adapters": count, "slots": slots, "tokens/s": speed, "of base": share})
    return rows


def prefill(bench: Bench) -> list[Row]:
    """Four long prompts at once, with 0, 1 and 4 adapters."""
    rows: list[Row] = []
    for count in (0, 1, 4):
        adapters = bench.adapters([16] * count)
        world = bench.world(adapters, 4, max_total_tokens=bench.long_prompt + 16, max_prefill=4 * bench.long_prompt)
        try:
            digests: list[str | None] = [*adapters] or [None]
            seconds = []
            for _ in range(4):
                for index in range(4):
                    world.add(bench.long_prompt, 1, digests[index % len(digests)])
                began = time.perf_counter()
                world.answers()
                seconds.append(time.perf_counter() - began)
        finally:
            world.engine.close()
        best = min(seconds[1:])
        over = _over(best, rows[0]["seconds"] if rows else None)
        rows.append({"prompts": f"4 x {bench.long_prompt}", "adapters": count, "seconds": best, "over base %": over})
    return rows


def activation(bench: Bench) -> list[Row]:
    """A rank-16 adapter from host memory to the device, alone and beside 8 decoding rows."""
    assert bench.model is not None
    count = 2 if bench.options.interpret else 16
    adapters = bench.adapters([16] * (count + 1))
    world = bench.world(adapters, 12, max_total_tokens=bench.prompt + 40 * count, pinned_bytes=bench.pinned_bytes)
    slots = world.worker._slots
    try:
        times = []
        for weights in list(adapters.values())[:4]:
            arranged = slots.arrange(weights)
            began = time.perf_counter()
            slots.install(0, slots.prepare(arranged))
            if bench.device.type == "cuda":
                torch.cuda.synchronize()
            times.append((time.perf_counter() - began) * 1e3)
        slots.clear(0)
        quiet, busy = [], []
        for _ in range(8):
            world.add(bench.prompt, 16 * count, None)
        names = iter(adapters)
        for index, (seconds, tokens) in enumerate(world.run()):
            if index > 8 * count and index % 6 == 0 and (name := next(names, None)):
                world.add(bench.prompt, 1, name)
            if len(tokens) == 8:
                (quiet if index <= 8 * count else busy).append(seconds * 1e3)
    finally:
        world.engine.close()
    return [
        {
            "activation ms": min(times), "quiet step p99 ms": _p99(quiet), "step p99 while loading ms": _p99(busy),
            "ratio": _p99(busy) / _p99(quiet),
        }
    ]  # fmt: skip


def capture(bench: Bench) -> list[Row]:
    """The time to capture every graph of a server for 128 rows."""
    batch = 2 if bench.options.interpret else 128
    world = bench.world(bench.adapters([16]), batch)
    try:
        graphs = world.worker._pass._graphs
        began = time.perf_counter()
        if graphs is not None:
            with torch.inference_mode():
                graphs.capture_all()
        return [{"graphs": 0 if graphs is None else graphs.num_captured, "seconds": time.perf_counter() - began}]
    finally:
        world.engine.close()


def quantised(bench: Bench) -> list[Row]:
    """Decode over 4- and 8-bit weights in groups of 128 beside plain ones."""
    base = {row["batch"]: row["step ms"] for row in bench.tables.get("decode, base", [])}
    plain, rows = bench.model, []
    for bits in (4, 8):
        bench.model = random_model(
            "tiny128" if bench.options.interpret else bench.options.shape, bench.dtype, bench.device, bits=bits
        )
        for batch in (1,) if bench.options.interpret else (1, 64):
            step_ms, _ = bench.decode(batch, {})
            rows.append(
                {"bits": bits, "batch": batch, "step ms": step_ms, "plain over it": base.get(batch, 0) / step_ms}
            )
    bench.model = plain
    return rows


def gemm_floor(bench: Bench, batch: int) -> float:
    """Milliseconds of all linears' products, without the head's, one after the other, as a graph."""
    model = bench.model
    assert model is not None
    inputs = {
        linear.in_size: torch.randn(batch, linear.in_size, dtype=bench.dtype, device=bench.device)
        for linear in model.linears
    }

    def products() -> None:
        for linear in model.linears:
            linear.forward(inputs[linear.in_size], None)

    with torch.inference_mode():
        products()
        if bench.device.type != "cuda":
            began = time.perf_counter()
            products()
            return (time.perf_counter() - began) * 1e3
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            products()
        times = []
        for _ in range(10):
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            first.record()
            graph.replay()
            last.record()
            torch.cuda.synchronize()
            times.append(first.elapsed_time(last))
    return statistics.median(times)


def main(description: str) -> int:
    """Check, measure, print, write the JSON file; 1 when a check or a part failed."""
    options = _options(description)
    if options.interpret:
        dispatch.INTERPRETS = True
        forward_pass.CAPTURE_ON_CPU = run_again
        options.shape = "tiny"
    elif not torch.cuda.is_available():
        print("no GPU here: --interpret runs the script in Triton's interpreter", file=sys.stderr)
        return 2
    bench = Bench(options)
    small = options.interpret
    bench.section("kernels against their references", 30, lambda: check_kernels(bench.device, small))
    bench.section(
        "engine against the CPU's engine, float32", 40, lambda: check_engine(bench.device, 2 if small else 200)
    )
    bench.section("graphs against plain steps", 20, lambda: check_graphs(bench.device, bench.dtype, small))
    print(f"\nchecks: {bench.wrong() or list(bench.failed) or 'all right'}", flush=True)
    if not options.only_checks:
        bench.model = random_model(options.shape, bench.dtype, bench.device)
        bench.section("decode, base", 30, lambda: base_decode(bench))
        bench.section("decode, rank 16", 80, lambda: lora_decode(bench, 16, bench.batches))
        bench.section("prefill", 20, lambda: prefill(bench))
        bench.section("prefill, forms of one linear", 15, lambda: prefill_forms(bench.device, bench.dtype, small=small))
        bench.section("decode, mixed ranks", 15, lambda: mixed_ranks(bench))
        bench.section("more adapters than the pool holds", 40, lambda: beyond_the_pool(bench))
        bench.section("activation", 15, lambda: activation(bench))
        bench.section("graph capture", 20, lambda: capture(bench))
        bench.section("decode, quantised", 40, lambda: quantised(bench))
        for rank in (8, 64):
            bench.section(f"decode, rank {rank}", 50, lambda rank=rank: lora_decode(bench, rank, bench.batches[1:4]))
        bench.model = None
        bench.weights.clear()
        # Late: these kernels serve nobody, and an illegal access would end all parts that follow.
        bench.section(
            "prefill, our own kernels", 15, lambda: prefill_forms(bench.device, bench.dtype, small=small, own=True)
        )
        if options.vllm:
            from gpu_vllm import measure_vllm  # only where it is asked for: vLLM is no part of our environment

            bench.section("vLLM, the same work", 130, lambda: measure_vllm(options.shape, PROMPT_TOKENS))
    _report(bench)
    return 1 if bench.wrong() or bench.failed else 0


def _options(description: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llama-3-8b", choices=("llama-3-8b", "qwen2.5-7b", "mistral-7b", "1b"))
    parser.add_argument("--budget", type=float, default=460, help="seconds for the whole run")
    parser.add_argument("--json", type=Path, default=Path("gpu.json"), help="file for all figures")
    parser.add_argument("--only-checks", action="store_true", help="no tables")
    parser.add_argument("--interpret", action="store_true", help="a tiny model in Triton's interpreter, without a GPU")
    parser.add_argument("--vllm", action="store_true", help="measure vLLM too, where it can be imported")
    return parser.parse_args()


def _report(bench: Bench) -> None:
    for line in bench.left_out:
        print(f"left out: {line}")
    for name, error in bench.failed.items():
        print(f"FAILED: {name}: {error}")
    for name in bench.wrong():
        print(f"WRONG: {name}")
    print(f"{time.monotonic() - bench.began:.0f} s in all; figures in {bench.options.json}")


def _print_table(name: str, rows: list[Row], seconds: float) -> None:
    print(f"\n## {name} ({seconds:.0f} s)\n")
    if not rows:
        return
    titles = list(rows[0])
    print("| " + " | ".join(titles) + " |\n|" + "---|" * len(titles))
    for row in rows:
        print("| " + " | ".join(f"{row[t]:.3g}" if isinstance(row[t], float) else str(row[t]) for t in titles) + " |")
    sys.stdout.flush()


def _over(value: float, base: float | None) -> float | None:
    return None if base is None else (value / base - 1) * 100


def _p99(times: list[float]) -> float:
    return sorted(times)[int(len(times) * 0.99)] if times else float("nan")
