"""What a server on a GPU may take at most beside its weights: found once, by running the widest steps.

What is left after that is the KV cache's, so that no later step runs out of memory.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from loraplex_models.adapters.paged_slots import AdapterRoom, PagedAdapterSlots
from loraplex_models.decoder import CausalLM
from loraplex_server.config import EngineConfig
from loraplex_server.engine.device_batch import DeviceBatchBuilder, StepSize
from loraplex_server.engine.device_sampler import sampler_kind
from loraplex_server.engine.graphs import Replay, StepGraphs, graph_sizes, most_graphs
from loraplex_server.engine.memory import GpuShares, most_total_tokens, settle_adapter_budgets
from loraplex_server.messages import SamplingParams

# What the driver keeps of a captured graph, some thousand nodes with their kernels' arguments.
GRAPH_BYTES = 8 << 20
# Between the allocator's blocks, and for what a driver takes later: modules of kernels, local memory.
SPARE_BYTES = 512 << 20
BLOCK_SIZE = 16  # of the profile's own small KV cache


class DeviceMemory(Protocol):
    """What a device tells of its memory, in bytes."""

    def free_and_total(self) -> tuple[int, int]:
        """What nobody has taken, and all there is."""

    def reserved(self) -> int:
        """What this process's allocator has taken."""

    def peak_reserved(self) -> int:
        """The most that it has had since `release`."""

    def release(self) -> None:
        """Wait for the device, give back what is not in use, and start a new peak."""


class CudaMemory:
    """The memory of one GPU. See `DeviceMemory`."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def free_and_total(self) -> tuple[int, int]:
        """What nobody has taken, and all there is."""
        free, total = torch.cuda.mem_get_info(self._device)
        return free, total

    def reserved(self) -> int:
        """What torch's allocator has taken."""
        return torch.cuda.memory_reserved(self._device)

    def peak_reserved(self) -> int:
        """The most that it has had since `release`."""
        return torch.cuda.max_memory_reserved(self._device)

    def release(self) -> None:
        """Wait for the device, give back what is not in use, and start a new peak."""
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self._device)


@dataclass(frozen=True, slots=True)
class WidestSteps:
    """The most that steps take at a time, in bytes."""

    forward: int  # a chunk of prompts beside decodes, and its logits
    sampling: int
    graphs: int


def free_kv_bytes(config: EngineConfig, model: CausalLM) -> int | None:
    """What a GPU has left for the KV cache: beside the adapters' budget, the widest steps and the graphs.

    None on a CPU. Raises NotEnoughMemory where nothing is left, or the adapters' budget cannot be read.
    """
    if model.device.type != "cuda":
        return None
    memory = CudaMemory(model.device)
    steps = measure_steps(config, model, memory)
    free, total = memory.free_and_total()
    shares = GpuShares(
        total=total,
        free=free,
        fraction=config.cuda_memory_fraction,
        adapters=settle_adapter_budgets(config.adapters, "cuda").device_bytes,
        forward=steps.forward,
        sampling=steps.sampling,
        graphs=steps.graphs,
        spare=SPARE_BYTES,
    )
    return shares.kv_bytes(model.kv_bytes_per_block(config.block_size), config.prefill_tokens, config.max_batch_size)


def measure_steps(config: EngineConfig, model: CausalLM, memory: DeviceMemory) -> WidestSteps:
    """Run the widest chunk, the steps of all graphs with what these keep, and the costliest choice of tokens."""
    room = AdapterRoom(0, 0)  # counted apart
    slots = PagedAdapterSlots(model, config.adapters.max_resident_adapters, config.adapters.max_lora_rank, room)
    most_tokens = most_total_tokens(config, model.config)
    with torch.inference_mode():
        forward = peak_of(memory, lambda: _compute_chunk(config, model, slots))
        graphs = 0
        if model.can_be_captured:
            sizes = graph_sizes(model, config.max_batch_size, config.prefill_tokens)
            graphs = peak_of(memory, lambda: _keep_graphs(sizes, most_tokens, model, slots))
            graphs += most_graphs(model, sizes) * GRAPH_BYTES
        sampling = peak_of(memory, lambda: _choose_tokens(config, model, most_tokens))
    return WidestSteps(forward, sampling, graphs)


def peak_of(memory: DeviceMemory, work: Callable[[], None]) -> int:
    """What some work takes at most, beside what stays after its first time: compiled kernels, libraries' workspaces."""
    work()
    memory.release()
    before = memory.reserved()
    work()
    taken = memory.peak_reserved() - before
    memory.release()
    return taken


def _compute_chunk(config: EngineConfig, model: CausalLM, slots: PagedAdapterSlots) -> None:
    """A full chunk beside as many decodes as there may be, with adapters of the highest rank on every linear."""
    num_tokens = config.prefill_tokens + config.max_batch_size
    num_blocks = -(-num_tokens // BLOCK_SIZE)
    batch = DeviceBatchBuilder(1, num_blocks, BLOCK_SIZE, slots, model.device).widest_batch(num_tokens)
    num_logits = num_tokens if config.enable_prefill_logprobs else config.max_batch_size
    rows = torch.arange(num_logits, device=model.device)
    model.forward(replace(batch, sample_rows=rows), model.new_kv_cache(num_blocks, BLOCK_SIZE))


def _keep_graphs(sizes: list[StepSize], most_tokens: int, model: CausalLM, slots: PagedAdapterSlots) -> None:
    """What the graphs of a server have in memory: inputs of each, the logits, and what a pass takes meanwhile."""

    def capture(forward: Callable[[], Tensor]) -> Replay:
        logits = forward()
        return lambda: logits

    StepGraphs(
        model,
        model.new_kv_cache(1, BLOCK_SIZE),
        slots.captured_pages,
        sizes=sizes,
        max_blocks=-(-most_tokens // BLOCK_SIZE),
        spare_cell=0,
        capture=capture,
    ).capture_all()


def _choose_tokens(config: EngineConfig, model: CausalLM, most_tokens: int) -> None:
    """Every row draws, with all cuts and penalties; one of them has the longest history."""
    vocab_size, count = model.config.vocab_size, config.max_batch_size
    sampler = sampler_kind(model.device)(
        count, vocab_size, model.device, watermark_gamma=config.watermark_gamma, watermark_delta=config.watermark_delta
    )
    params = SamplingParams(
        max_new_tokens=1, do_sample=True, temperature=0.7, top_k=50, top_p=0.9, typical_p=0.9, min_p=0.01,
        repetition_penalty=1.1, frequency_penalty=0.1, count_penalty=0.1, logit_bias={0: 1.0}, num_logprobs=5,
    )  # fmt: skip
    for row in range(count):
        sampler.add(row, params, [0] * (1 if row else most_tokens))
    sampler.launch(torch.zeros(count, vocab_size, device=model.device), list(range(count))).read()
