"""Share out the memory that is left after the weights, and settle the limits that follow from it."""

import re
from dataclasses import dataclass, replace

import torch

from loraplex_models.adapters.paged_slots import AdapterRoom
from loraplex_models.config import ModelConfig
from loraplex_models.decoder import CausalLM
from loraplex_server.config import AdapterConfig, EngineConfig
from loraplex_server.machine import look_at_machine

UNITS = {"": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30, "kb": 10**3, "mb": 10**6, "gb": 10**9}


class NotEnoughMemory(RuntimeError):
    """A budget cannot be read, or holds less than one useful request; the message gives the numbers and the flag."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What the engine settled on."""

    num_kv_blocks: int
    max_input_tokens: int
    max_total_tokens: int
    kv_bytes: int


@dataclass(frozen=True, slots=True)
class AdapterBudgets:
    """What the weights of all adapters may take in each tier."""

    host_bytes: int
    device_bytes: int


@dataclass(frozen=True, slots=True)
class GpuShares:
    """What a GPU's memory goes to once the weights are in it, in bytes; what is left is the KV cache's."""

    total: int
    free: int
    fraction: float  # of `total` that may be taken by all together
    adapters: int
    forward: int
    sampling: int
    graphs: int
    spare: int

    def kv_bytes(self, block_bytes: int, chunk_tokens: int, max_batch_size: int) -> int:
        """What is left. Raises NotEnoughMemory, with all shares and what makes them smaller, if that is not a block."""
        withheld = self.total - int(self.fraction * self.total)
        taken = self.adapters + self.forward + self.sampling + self.graphs + self.spare
        # One block is for what the rows of a graph write that have no sequence.
        left = self.free - withheld - taken - block_bytes
        if left >= block_bytes:
            return left
        raise NotEnoughMemory(
            f"the GPU has no memory left for a KV cache: of {_mib(self.total)} {_mib(self.free)} are free beside the "
            f"weights; {_mib(self.adapters)} are for adapters (--adapter-device-memory), {_mib(self.forward)} for "
            f"chunks of {chunk_tokens} tokens (--max-batch-prefill-tokens), {_mib(self.sampling)} for the choice of "
            f"{max_batch_size} tokens and {_mib(self.graphs)} for graphs (--max-batch-size), "
            f"{_mib(withheld)} are for others (--cuda-memory-fraction {self.fraction:g}), {_mib(self.spare)} are "
            f"spare: that is {_mib(block_bytes - left)} too much for a single block"
        )


def settle_adapter_budgets(config: AdapterConfig, device: str = "cpu") -> AdapterBudgets:
    """Resolve the adapters' budgets, once. On a CPU both are host memory. Raises NotEnoughMemory."""
    host_bytes = look_at_machine().memory_bytes
    device_bytes = torch.cuda.mem_get_info()[1] if device == "cuda" else host_bytes
    return AdapterBudgets(
        host_bytes=num_bytes_of(config.adapter_host_memory, host_bytes, "--adapter-host-memory"),
        device_bytes=num_bytes_of(config.adapter_device_memory, device_bytes, "--adapter-device-memory"),
    )


def settle_adapter_room(config: EngineConfig) -> AdapterRoom:
    """What adapters may take of the memory of one rank, and of its share of the host's. Raises NotEnoughMemory."""
    budgets = settle_adapter_budgets(config.adapters, config.device)
    return AdapterRoom(budgets.host_bytes // config.num_local_ranks, budgets.device_bytes)


def num_bytes_of(text: str, whole_bytes: int, flag: str) -> int:
    """Read a size: bytes with or without a unit (4GiB, 512MB), or a share of `whole_bytes` (0.2).

    Raises NotEnoughMemory.
    """
    if re.fullmatch(r"0?\.\d+|1\.0*", text):
        return int(float(text) * whole_bytes)
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([A-Za-z]*)", text)
    if match is None or match[2].lower() not in UNITS:
        raise NotEnoughMemory(f"{flag} is '{text}': give bytes with a unit (4GiB, 512MB) or a share (0.2)")
    return int(float(match[1]) * UNITS[match[2].lower()])


def settle_group_limits(config: EngineConfig, model: CausalLM, kv_bytes: int | None = None) -> Limits:
    """The limits that every rank of the model's group can keep, the same on each.

    Raises NotEnoughMemory, and RanksLost when another rank has ended.
    """
    limits = settle_limits(config, model.config, model.kv_bytes_per_block(config.block_size), kv_bytes)
    num_blocks = min(number for (number,) in model.group.gather_numbers([limits.num_kv_blocks]))
    if num_blocks == limits.num_kv_blocks:
        return limits
    config = replace(config, num_kv_blocks=num_blocks)
    return settle_limits(config, model.config, model.kv_bytes_per_block(config.block_size))


def most_total_tokens(config: EngineConfig, model: ModelConfig) -> int:
    """The longest request that the model reads and the settings allow, whatever the memory is."""
    max_positions = model.max_positions
    if config.rope_scaling and config.rope_factor:
        max_positions = int(max_positions * config.rope_factor)
    return min(config.max_total_tokens or max_positions, max_positions)


def settle_limits(
    config: EngineConfig, model: ModelConfig, kv_bytes_per_block: int, kv_bytes: int | None = None
) -> Limits:
    """Resolve every «auto» of the KV cache and of the request lengths, once.

    `kv_bytes`: what the cache may take on a GPU; None for a share of this machine's memory. Raises NotEnoughMemory.
    """
    max_total = most_total_tokens(config, model)
    size = config.block_size
    more = f"--kv-memory-fraction (now {config.kv_memory_fraction})"
    # Beyond this no set of sequences could use more.
    most_blocks = config.max_batch_size * -(-max_total // size)
    if config.num_kv_blocks:
        num_blocks = config.num_kv_blocks
    elif config.max_batch_total_tokens:
        num_blocks = -(-config.max_batch_total_tokens // size)
    else:
        share = int(look_at_machine().memory_bytes * config.kv_memory_fraction) // config.num_local_ranks
        num_blocks = min((share if kv_bytes is None else kv_bytes) // kv_bytes_per_block, most_blocks)
    if kv_bytes is not None:
        more = f"--cuda-memory-fraction (now {config.cuda_memory_fraction})"
    if kv_bytes is not None and num_blocks * kv_bytes_per_block > kv_bytes:
        raise NotEnoughMemory(
            f"{num_blocks} KV blocks of {size} tokens take {_mib(num_blocks * kv_bytes_per_block)}, and the GPU has "
            f"{_mib(kv_bytes)} left for them: lower --num-kv-blocks or --max-batch-total-tokens, or leave them out"
        )
    capacity = num_blocks * size
    if config.max_total_tokens and capacity < max_total:
        raise NotEnoughMemory(
            f"the KV cache has room for {capacity} tokens, less than --max-total-tokens {max_total}: "
            f"lower it, or raise --max-batch-total-tokens or {more}"
        )
    max_total = min(max_total, capacity)
    if max_total < 2:
        raise NotEnoughMemory(f"the KV cache has room for {capacity} tokens: free memory, or raise {more}")
    max_input = min(config.max_input_tokens or max_total - 1, max_total - 1)
    return Limits(num_blocks, max_input, max_total, num_blocks * kv_bytes_per_block)


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:.0f} MiB"
