"""The tables of bench/gpu.py: what is measured, and in which order. Each part gives its rows one by one."""

import argparse
import statistics
import sys
import time
from collections.abc import Iterator

import torch
from gpu_checks import check_engine, check_graphs, check_kernels
from gpu_prefill import prefill_forms
from gpu_report import Row
from gpu_run import PROMPT_TOKENS, Bench
from gpu_world import World, random_model

from loraplex_kernels import dispatch
from loraplex_models.adapters.paged_slots import AdapterRoom, PagedAdapterSlots
from loraplex_server.engine import forward_pass
from loraplex_server.engine.graphs import run_again

MIXED_RANKS = {8: 16, 16: 8, 32: 5, 64: 3}  # adapters of each rank among 32 rows


def base_decode(bench: Bench) -> Iterator[Row]:
    """Decode without adapters beside the products alone."""
    with bench.world({}, bench.batches[-1]) as world:
        for batch in bench.batches:
            if bench.is_late(f"base, batch {batch}"):
                continue
            step_ms, tokens_s = bench.decode(world, batch)
            yield {"batch": batch, "GEMMs ms": gemm_floor(bench, batch), "step ms": step_ms, "tokens/s": tokens_s}


def lora_decode(bench: Bench, rank: int, batches: list[int]) -> Iterator[Row]:
    """Decode with n distinct adapters of one rank."""
    counts = [count for count in bench.counts if count <= batches[-1]]
    adapters = bench.adapters([rank] * counts[-1])
    with bench.world(adapters, batches[-1]) as world:
        for batch in batches:
            for count in [count for count in counts if count <= batch]:
                if bench.is_late(f"rank {rank}, batch {batch}, {count} adapters"):
                    continue
                step_ms, tokens_s = bench.decode(world, batch, [*adapters][:count])
                over = _over(step_ms, _base_ms(bench, batch))
                yield {
                    "batch": batch, "adapters": count, "step ms": step_ms, "tokens/s": tokens_s, "over base %": over,
                }  # fmt: skip


def mixed_ranks(bench: Bench) -> Iterator[Row]:
    """32 rows with 32 adapters of ranks 8 to 64."""
    ranks = [3, 8, 17] if bench.options.interpret else [r for r, count in MIXED_RANKS.items() for _ in range(count)]
    adapters = bench.adapters(ranks)
    with bench.world(adapters, len(ranks)) as world:
        base_ms, _ = bench.decode(world, len(ranks))
        step_ms, tokens_s = bench.decode(world, len(ranks), [*adapters])
    yield {
        "rows": len(ranks), "base ms": base_ms, "step ms": step_ms, "added ms": step_ms - base_ms,
        "tokens/s": tokens_s,
    }  # fmt: skip


def beyond_the_pool(bench: Bench) -> Iterator[Row]:
    """64 requests over n adapters of rank 16, with room on the device for 8, and for 32, which is that of 8 of rank 64.

    With one adapter each, as many rows decode at a time as adapters have room: so the base is measured with all rows,
    and with so many.
    """
    requests, rooms, rank = (4, (2,), 4) if bench.options.interpret else (64, (8, 32), 16)
    counts = (4, 2) if bench.options.interpret else (64, 16, 8, 1)
    adapters = bench.adapters([rank] * max(counts))
    for slots in rooms:
        with bench.world(adapters, requests, num_slots=slots, pinned_bytes=bench.pinned_bytes) as world:
            world.worker.warm_up()
            bench.fill(world, requests, [*adapters])  # all come into host memory
            world.answers()

            def speed(num_rows: int, digests: list[str], world: World = world) -> float:
                bench.fill(world, num_rows, digests)
                began = time.perf_counter()
                world.answers()
                return num_rows * bench.num_new / (time.perf_counter() - began)

            base, narrow_base = speed(requests, []), speed(slots, [])
            for count in counts:
                if bench.is_late(f"{count} adapters over {slots} slots"):
                    continue
                found = speed(requests, [*adapters][:count])
                yield {
                    "requests": requests, "adapters": count, "room for": slots, "tokens/s": found,
                    "of base": found / base, "of base, that many rows": found / narrow_base,
                }  # fmt: skip


def prefill(bench: Bench) -> Iterator[Row]:
    """Four long prompts at once, with 0, 1 and 4 adapters."""
    adapters = bench.adapters([16] * 4)
    sizes = {"max_total_tokens": bench.long_prompt + 16, "max_prefill": 4 * bench.long_prompt}
    with bench.world(adapters, 4, **sizes) as world:
        base = None
        for count in (0, 1, 4):
            digests = [*adapters][:count] or [None]
            seconds = []
            for _ in range(2 if bench.options.interpret else 4):
                for index in range(4):
                    world.add(bench.long_prompt, 1, digests[index % len(digests)])
                began = time.perf_counter()
                world.answers()
                seconds.append(time.perf_counter() - began)
            best = min(seconds[1:])
            base = base or best
            yield {
                "prompts": f"4 x {bench.long_prompt}", "adapters": count, "seconds": best,
                "over base %": _over(best, base) if count else None,
            }  # fmt: skip


def activation(bench: Bench) -> Iterator[Row]:
    """A rank-16 adapter from host memory to the device, alone and beside 8 decoding rows."""
    count = 2 if bench.options.interpret else 16
    adapters = bench.adapters([16] * (count + 1))
    alone = PagedAdapterSlots(bench.model, 1, 16, AdapterRoom(host_bytes=bench.pinned_bytes // 8))
    arranged = alone.arrange(next(iter(adapters.values())))
    times = []
    for _ in range(4):
        began = time.perf_counter()
        alone.install(0, alone.prepare(arranged))
        if bench.device.type == "cuda":
            torch.cuda.synchronize()
        times.append((time.perf_counter() - began) * 1e3)
        alone.clear(0)
    sizes = {"max_total_tokens": bench.prompt + 16 * count, "num_slots": count // 2}
    with bench.world(adapters, 12, pinned_bytes=bench.pinned_bytes, **sizes) as world:
        world.worker.warm_up()
        for name in adapters:  # all come into host memory; the first have left the device when the last are there
            world.add(bench.prompt, 1, name)
        world.answers()
        quiet, busy = _steps_while_loading(bench, world, [*adapters], 4 * count, 12 * count)
    yield {
        "activation ms": min(times), "quiet step p99 ms": _p99(quiet), "step p99 while loading ms": _p99(busy),
        "ratio": _p99(busy) / _p99(quiet),
    }  # fmt: skip


def _steps_while_loading(
    bench: Bench, world: World, names: list[str], first_load: int, num_steps: int
) -> tuple[list[float], list[float]]:
    """Milliseconds of the steps in which just 8 rows decode: those up to step `first_load`, and the others."""
    quiet, busy = [], []
    unloaded = iter(names)
    for _ in range(8):
        world.add(bench.prompt, num_steps, None)
    for index, (seconds, tokens) in enumerate(world.run()):
        if index > first_load and index % 6 == 0 and (name := next(unloaded, None)):
            world.add(bench.prompt, 1, name)
        if len(tokens) == 8:
            (quiet if index <= first_load else busy).append(seconds * 1e3)
    return quiet, busy


def capture(bench: Bench) -> Iterator[Row]:
    """The time to capture every graph of a server for 128 rows."""
    with bench.world(bench.adapters([16]), bench.batches[-1]) as world:
        graphs = world.worker._pass._graphs
        began = time.perf_counter()
        world.worker.warm_up()
        yield {"graphs": 0 if graphs is None else graphs.num_captured, "seconds": time.perf_counter() - began}


def quantised(bench: Bench) -> Iterator[Row]:
    """Decode over 4- and 8-bit weights in groups of 128 beside plain ones."""
    shape, batches = ("tiny128", [1]) if bench.options.interpret else (bench.options.shape, [1, 64])
    for bits in (4, 8):
        model = random_model(shape, bench.dtype, bench.device, bits=bits)
        with bench.world({}, batches[-1], model=model) as world:
            for batch in batches:
                step_ms, _ = bench.decode(world, batch)
                base_ms = _base_ms(bench, batch)
                plain_over_it = None if base_ms is None else base_ms / step_ms
                yield {"bits": bits, "batch": batch, "step ms": step_ms, "plain over it": plain_over_it}


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


def main(options: argparse.Namespace) -> int:
    """Check, measure, print, write the JSON file; 1 when a check or a part failed."""
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
    print(f"\nchecks: {bench.report.wrong() or list(bench.report.failed) or 'all right'}", flush=True)
    if not options.only_checks:
        bench.section("decode, base", 30, lambda: base_decode(bench))
        bench.section("decode, rank 16", 80, lambda: lora_decode(bench, 16, bench.batches))
        bench.section("prefill", 20, lambda: prefill(bench))
        bench.section("prefill, forms of one linear", 15, lambda: prefill_forms(bench.device, bench.dtype, small=small))
        bench.section("decode, mixed ranks", 15, lambda: mixed_ranks(bench))
        bench.section("more adapters than the pool holds", 60, lambda: beyond_the_pool(bench))
        bench.section("activation", 15, lambda: activation(bench))
        bench.section("graph capture", 20, lambda: capture(bench))
        bench.section("decode, quantised", 40, lambda: quantised(bench))
        for rank in (8, 64):
            bench.section(f"decode, rank {rank}", 50, lambda rank=rank: lora_decode(bench, rank, bench.batches[1:4]))
        bench.forget_model()
        # Late: these kernels serve nobody.
        bench.section(
            "prefill, our own kernels", 15, lambda: prefill_forms(bench.device, bench.dtype, small=small, own=True)
        )
        if options.vllm:
            from gpu_vllm import measure_vllm  # only where it is asked for: vLLM is no part of our environment

            bench.section("vLLM, the same work", 130, lambda: measure_vllm(options.shape, PROMPT_TOKENS))
    bench.print_end()
    return 1 if bench.report.wrong() or bench.report.failed else 0


def _base_ms(bench: Bench, batch: int) -> float | None:
    """Milliseconds of a step without adapters, where the part before has measured them."""
    rows = bench.report.tables.get("decode, base", [])
    return next((row["step ms"] for row in rows if row["batch"] == batch), None)


def _over(value: float, base: float | None) -> float | None:
    return None if base is None else (value / base - 1) * 100


def _p99(times: list[float]) -> float:
    return sorted(times)[int(len(times) * 0.99)] if times else float("nan")
