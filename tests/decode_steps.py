"""Decode steps that must not wait for the device but to read the step before, on a GPU or on the stand-in for one."""

import sys
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parents[1] / "bench"))
from gpu_world import make_world, random_adapter, random_model


def decode_without_waiting(device: torch.device, dtype: torch.dtype, *, num_steps: int) -> None:
    """Rows with an adapter and one without: in so many steps any other wait is an error."""
    model = random_model("tiny", dtype, device)
    adapter = random_adapter(model.config, model, 8, 1)
    world = make_world(model, {adapter.digest: adapter}, max_batch_size=4, max_total_tokens=96, num_slots=1, max_rank=8)
    try:
        names = [world.add(5, 3 * num_steps, digest) for digest in (None, adapter.digest, adapter.digest)]
        steps = world.run()
        while len(next(steps)[1]) < len(names):  # compiles and captures, and brings the adapter in
            pass
        next(steps)
        torch.cuda.set_sync_debug_mode("error")
        try:
            found = [next(steps)[1] for _ in range(num_steps)]
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert all(set(tokens) == set(names) for tokens in found)
        for _ in steps:
            pass
    finally:
        world.engine.close()
