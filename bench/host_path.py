"""Time what the host does for a step beside the forward pass: plan it, route its adapters, stage its tensors.

By default 256 rows that decode, over 64 adapters of mixed ranks. Nothing is computed: each row is given a token as if a
model had chosen it; with --ahead 1, as on a GPU, when the next step was planned and staged. Printed are medians and
99th percentiles in milliseconds.
"""

import argparse
import statistics
import tempfile
import time
from collections import deque
from pathlib import Path

import torch
from tiny_world import make_model

from loraplex_models.adapters.slots import AdapterSlots
from loraplex_models.adapters.weights import AdapterWeights
from loraplex_models.decoder import CausalLM
from loraplex_models.loader import load_model
from loraplex_models.parallel import ParallelGroup
from loraplex_server.engine.adapters.host_cache import FinishedLoad
from loraplex_server.engine.adapters.manager import AdapterManager
from loraplex_server.engine.batch_builder import BatchBuilder
from loraplex_server.engine.block_manager import BlockManager
from loraplex_server.engine.scheduler import Scheduler
from loraplex_server.engine.sequence import new_sequence
from loraplex_server.engine.step import StepPlan
from loraplex_server.messages import AdapterSpec, GenerateRequest, SamplingParams

BLOCK_SIZE = 16
RANKS = (4, 8, 16, 32, 64)
TOKEN = 7


class HostPath:
    """The scheduler and the batch builder of one rank, without a model between them."""

    def __init__(
        self, model: CausalLM, num_rows: int, num_adapters: int, prompt_length: int, num_steps: int, ahead: int
    ):
        length = prompt_length + num_steps + 1
        num_blocks = num_rows * (length // BLOCK_SIZE + 2)
        self._blocks = BlockManager(num_blocks, BLOCK_SIZE)
        self._adapters = AdapterManager(num_adapters, host_budget_bytes=2**40, device_budget_bytes=2**40)
        self._scheduler = Scheduler(
            self._blocks,
            self._adapters,
            max_batch_size=num_rows,
            max_prefill_tokens=num_rows * prompt_length,
            end_token_ids=frozenset(),
        )
        self._slots = AdapterSlots(model, num_adapters)
        self._builder = BatchBuilder(num_rows, -(-length // BLOCK_SIZE), BLOCK_SIZE, self._slots, torch.device("cpu"))
        self._model = model
        self._ahead = ahead
        self._in_flight: deque[StepPlan] = deque()
        self._last_token_ids = torch.full((num_rows,), TOKEN)
        for number in range(num_adapters):
            spec = AdapterSpec(adapter_id=f"a{number}", digest=str(number), path="", rank=8, num_bytes=1)
            self._adapters.register(spec)
        for number in range(num_rows):
            digest = str(number % num_adapters)
            request = GenerateRequest(
                request_id=str(number),
                prompt_token_ids=[3 + number % 90] * prompt_length,
                sampling=SamplingParams(max_new_tokens=num_steps, ignore_eos=True),
                adapter_id=f"a{digest}",
                adapter_digest=digest,
            )
            self._scheduler.add(new_sequence(request, number))
        while self._scheduler.waiting:
            self.step()

    def step(self) -> tuple[float, float, float]:
        """One step; seconds of planning, of routing and staging, and of taking in its result."""
        began = time.perf_counter()
        plan = self._scheduler.schedule()
        planned = time.perf_counter()
        assert plan is not None
        for operation in plan.adapter_ops:
            match operation.kind:
                case "host_load":
                    self._adapters.finished(FinishedLoad(operation.digest, "host", 1, None))
                case "device_load":
                    self._adapters.finished(FinishedLoad(operation.digest, "device", 1, None))
                case "slot_load":
                    rank = RANKS[operation.slot % len(RANKS)]
                    self._slots.set(operation.slot, _weights(self._model, operation.digest, rank))
        for start in plan.row_starts:
            self._builder.start_row(start.row)
        prepared = time.perf_counter()
        if plan.sequences:
            self._builder.build(plan, self._last_token_ids)
        staged = time.perf_counter()
        self._in_flight.append(plan)
        if len(self._in_flight) > self._ahead:
            plan = self._in_flight.popleft()
            self._scheduler.advance(plan, {s.row: TOKEN for s in plan.sequences if s.samples})
        return planned - began, staged - prepared, time.perf_counter() - staged


def _weights(model: CausalLM, digest: str, rank: int) -> AdapterWeights:
    modules = {
        module: (torch.zeros(rank, linear.in_size), torch.zeros(out_size, rank))
        for linear in model.linears
        for module, out_size in linear.parts.items()
    }
    return AdapterWeights(digest, rank, modules)


def main() -> None:
    """Run the steps and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--adapters", type=int, default=64)
    parser.add_argument("--prompt-length", type=int, default=192)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--ahead", type=int, default=1, choices=(0, 1), help="steps in flight when the next is planned")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder))
        model = load_model(folder, dtype=torch.float32, device=torch.device("cpu"), group=ParallelGroup.single())
    path = HostPath(model, options.rows, options.adapters, options.prompt_length, options.steps, options.ahead)
    times = [path.step() for _ in range(options.steps - 1)]
    print(f"{options.rows} rows over {options.adapters} adapters, {len(times)} decode steps; milliseconds")
    columns = {
        "planning": [t[0] for t in times],
        "routing and staging": [t[1] for t in times],
        "both": [t[0] + t[1] for t in times],
        "taking in the result": [t[2] for t in times],
    }
    for name, seconds in columns.items():
        milliseconds = sorted(1000 * s for s in seconds)
        p99 = milliseconds[len(milliseconds) * 99 // 100]
        print(f"{name:22} median {statistics.median(milliseconds):6.3f}   p99 {p99:6.3f}")


if __name__ == "__main__":
    main()
