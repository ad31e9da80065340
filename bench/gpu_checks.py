"""Is it right? What bench/gpu.py asks before it measures: each row says what was compared and whether it is ok."""

import random
from collections.abc import Iterator
from typing import Any

import torch
from gpu_world import make_world, random_adapter, random_model

from loraplex_kernels import dispatch
from loraplex_kernels.self_check import ModelSizes, compare_kernels

Row = dict[str, Any]


def check_kernels(device: torch.device, small: bool) -> Iterator[Row]:
    """Each kernel at sizes of a real model, in each number type, against its reference."""
    sizes = ModelSizes(64, 16, 4, 2, 300, (4, 8), True) if small else ModelSizes(4096, 128, 32, 8, 128256, (4, 8), True)
    for dtype in (torch.float32, torch.float16) if small else (torch.float32, torch.bfloat16):
        for found in compare_kernels(device, dtype, sizes):
            yield {
                "kernel": found.kernel, "type": str(dtype)[6:], "error": found.error, "limit": found.limit,
                "ok": found.is_near,
            }  # fmt: skip


def check_engine(device: torch.device, num_batches: int) -> list[Row]:
    """Greedy tokens of both engines over the same float32 weights, for random mixes of requests and adapters."""
    cpu, answers = torch.device("cpu"), []
    interprets, threads = dispatch.INTERPRETS, torch.get_num_threads()
    torch.set_num_threads(1)  # all is small: more threads would mostly wait for each other
    for where in (cpu, device):
        dispatch.INTERPRETS = interprets and len(answers) == 1
        model = random_model("tiny", torch.float32, where, source=cpu, std=0.12)
        adapters = {
            weights.digest: weights
            for weights in (random_adapter(model.config, model, rank, rank, 0.1) for rank in (1, 8, 12, 40))
        }
        world = make_world(
            model, adapters, max_batch_size=8, max_total_tokens=64, num_slots=2, max_rank=64, max_prefill=48
        )
        rng, found = random.Random(7), []
        try:
            for _ in range(num_batches):
                for _ in range(rng.randint(1, 6)):
                    world.add(rng.randint(3, 40), 6, rng.choice([None, *adapters]))
                found.append(world.answers())
        finally:
            world.engine.close()
        answers.append(found)
    dispatch.INTERPRETS = interprets
    torch.set_num_threads(threads)
    differing = sum(ours != truth for truth, ours in zip(*answers, strict=True))
    return [
        {
            "mixed batches": num_batches,
            "requests": sum(map(len, answers[0])),
            "differing": differing,
            "ok": differing == 0,
        }
    ]


def check_graphs(device: torch.device, dtype: torch.dtype, small: bool) -> list[Row]:
    """Tokens of the engine with captured decodes and without, where adapters come and go between replays."""
    model = random_model("tiny" if small else "4 layers", dtype, device)  # its kernels are those of 8B
    ranks = (3, 9) if small else (8, 16, 64, 33)
    adapters = {w.digest: w for w in (random_adapter(model.config, model, rank, rank) for rank in ranks)}
    found = []
    for has_graphs in (True, False):
        world = make_world(model, adapters, max_batch_size=8, max_total_tokens=96, num_slots=2, max_rank=64)
        if not has_graphs:
            world.worker._pass._graphs = None
        try:
            for index in range(3 if small else 24):
                world.add(5 + index, 4 if small else 12, [None, *adapters][index % (1 + len(adapters))])
            found.append(world.answers())
        finally:
            world.engine.close()
    pairs = [(token, other) for name, ids in found[0].items() for token, other in zip(ids, found[1][name], strict=True)]
    same = sum(token == other for token, other in pairs) / len(pairs)
    # Splits depend on the batch's size; in bfloat16 that turns a near tie now and then, and what follows it.
    return [{"tokens": len(pairs), "same share": same, "ok": same >= (1.0 if dtype is torch.float32 else 0.8)}]
