"""--attention-backend: what lets prompts attend on a GPU, and whether it can, asked before anything is loaded."""

import logging

import numpy as np
import torch

from loraplex_kernels.dispatch import has_gpu_forms
from loraplex_kernels.flashinfer_prompts import AttentionSizes, FlashInferError, HostChunks, PromptAttention
from loraplex_kernels.reference.attention import chunk_attention
from loraplex_models.config import ModelConfig
from loraplex_models.layers.block_attention import NO_WINDOW
from loraplex_server.config import EngineConfig
from loraplex_server.engine.device import DeviceError

logger = logging.getLogger(__name__)

OURS = "--attention-backend triton asks for no other package"


def open_prompt_attention(
    config: EngineConfig, shape: ModelConfig, dtype: torch.dtype, device: torch.device
) -> PromptAttention | None:
    """Return what takes the place of our kernel for prompts; None where that stays. `shape`: a rank's part.

    FlashInfer is compared with plain torch first, at each start, unless `check_kernels` is off: it is a package that we
    do not ship, compiled on this machine. Raises DeviceError where it cannot serve, or differs.
    """
    if config.attention_backend == "triton":
        return None
    if not has_gpu_forms(device):
        raise DeviceError(f"--attention-backend flashinfer: FlashInfer computes on GPUs, not on {device}; {OURS}")
    scale = shape.head_dim**-0.5 if shape.attention_scale is None else shape.attention_scale
    sizes = AttentionSizes(shape.num_heads, shape.num_kv_heads, shape.head_dim, scale, shape.attention_cap, dtype)
    try:
        attention = PromptAttention(sizes, device)
        if config.check_kernels:
            for window in [None] if shape.sliding_window is None else [None, 9]:
                _compare(sizes, config.block_size, window, device)
    except FlashInferError as error:
        raise DeviceError(f"--attention-backend flashinfer: {error}; {OURS}") from None
    except (RuntimeError, OSError, TypeError) as error:
        # It compiles what it lacks, with nvcc and ninja, and says so in these; another version has other arguments.
        raise DeviceError(f"--attention-backend flashinfer: it cannot run here: {error}; {OURS}") from error
    logger.info("prompts attend by FlashInfer")
    return attention


def _compare(sizes: AttentionSizes, block_size: int, window: int | None, device: torch.device) -> None:
    """Three chunks in scattered blocks, one of them a whole prompt. Raises FlashInferError where they differ."""
    from loraplex_kernels.self_check import (  # imports Triton, which machines without a GPU may lack
        TOLERANCES,
        difference,
    )

    generator = torch.Generator().manual_seed(0)
    seq_lens, starts = np.array([33, 7, 70], np.int32), np.array([0, 3, 10, 30], np.int32)
    num_blocks = -(-seq_lens // block_size)
    table = np.zeros((3, int(num_blocks.max())), np.int32)
    order = torch.randperm(int(num_blocks.sum()), generator=generator).numpy()
    table[np.arange(table.shape[1]) < num_blocks[:, None]] = order

    def numbers(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device, sizes.dtype)

    queries = numbers(int(starts[-1]), sizes.num_heads * sizes.head_dim)
    cache = numbers(len(order) * block_size, 2 * sizes.num_kv_heads * sizes.head_dim)
    ours = torch.empty_like(queries)
    PromptAttention(sizes, device).plan(HostChunks(starts, seq_lens, table), block_size, window).run(
        queries, cache, ours
    )
    blocks, query_start, lengths = (torch.from_numpy(one).to(device) for one in (table, starts, seq_lens))
    truth = chunk_attention(
        queries, cache, blocks, query_start, lengths, block_size, sizes.num_kv_heads, sizes.scale, window or NO_WINDOW,
        sizes.cap,
    )  # fmt: skip
    error = difference(ours, truth)
    if not error <= TOLERANCES[sizes.dtype]:  # what is no number differs too
        raise FlashInferError(f"with window {window} it differs from plain torch by {error:.1e}")
