"""Share out the memory that is left after the weights, and settle the limits that follow from it."""

from dataclasses import dataclass

from loraplex_models.config import ModelConfig
from loraplex_server.config import EngineConfig
from loraplex_server.machine import look_at_machine


class NotEnoughMemory(RuntimeError):
    """The KV cache would hold less than one useful request; the message gives the numbers and the flag."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What the engine settled on."""

    num_kv_blocks: int
    max_input_tokens: int
    max_total_tokens: int
    kv_bytes: int


def settle_limits(config: EngineConfig, model: ModelConfig, kv_bytes_per_block: int) -> Limits:
    """Resolve every «auto» of the KV cache and of the request lengths, once.

    Raises NotEnoughMemory.
    """
    max_positions = model.max_positions
    if config.rope_scaling and config.rope_factor:
        max_positions = int(max_positions * config.rope_factor)
    max_total = min(config.max_total_tokens or max_positions, max_positions)
    size = config.block_size
    # Beyond this no set of sequences could use more.
    most_blocks = config.max_batch_size * -(-max_total // size)
    if config.num_kv_blocks:
        num_blocks = config.num_kv_blocks
    elif config.max_batch_total_tokens:
        num_blocks = -(-config.max_batch_total_tokens // size)
    else:
        free_bytes = int(look_at_machine().memory_bytes * config.kv_memory_fraction)
        num_blocks = min(free_bytes // kv_bytes_per_block, most_blocks)
    capacity = num_blocks * size
    if config.max_total_tokens and capacity < max_total:
        raise NotEnoughMemory(
            f"the KV cache has room for {capacity} tokens, less than --max-total-tokens {max_total}: "
            f"lower it, or raise --kv-memory-fraction (now {config.kv_memory_fraction}) or --max-batch-total-tokens"
        )
    max_total = min(max_total, capacity)
    if max_total < 2:
        raise NotEnoughMemory(
            f"the KV cache has room for {capacity} tokens: raise --kv-memory-fraction "
            f"(now {config.kv_memory_fraction}) or free memory"
        )
    max_input = min(config.max_input_tokens or max_total - 1, max_total - 1)
    return Limits(num_blocks, max_input, max_total, num_blocks * kv_bytes_per_block)
