"""Attention of prompts by FlashInfer, an optional library for NVIDIA's GPUs (https://docs.flashinfer.ai).

It takes a step in two: a plan, once for all layers with one window, from what the host knows; then a run for each
layer. Written against the source of version 0.7.2. What of it decides the form here:
 - keys and values may be views with strides, as long as both have the same: our cells are read as they are;
 - `plan` copies host tensors without waiting only if they are pinned, and what it works out itself through a pinned
   buffer of the wrapper's own, which it writes again at the next call without asking whether that copy is done;
 - in a CUDA graph its decoding takes two launches a layer for small batches, parts and their join; ours takes one.
   Decodes stay with ours.
"""

import importlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# What its kernels are instantiated for, of what models have.
HEAD_DIMS: tuple[int, ...] = (64, 128, 256)
DTYPES: tuple[torch.dtype, ...] = (torch.float16, torch.bfloat16)
WORKSPACE_BYTES = 128 << 20  # for the parts of long sequences; what its documentation recommends


class FlashInferError(Exception):
    """FlashInfer cannot serve this; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class AttentionSizes:
    """What all layers of a model, or of a rank's part, have in common."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    cap: float | None
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class HostChunks:
    """A step's chunks of prompts, as the host knows them: P sequences, whose rows stand one after the other."""

    query_start: NDArray[np.int32]  # [P + 1], where each sequence's rows start
    seq_lens: NDArray[np.int32]  # [P], keys of each
    block_table: NDArray[np.int32]  # [P, max_blocks], the blocks of each sequence in order


@dataclass(frozen=True, slots=True)
class PlannedPrompts:
    """A step's chunks, ready to attend in every layer with one window."""

    wrapper: Any
    sizes: AttentionSizes
    block_size: int

    def run(self, queries: Tensor, cache: Tensor, out: Tensor) -> None:
        """Let the queries attend to their blocks, each to the keys up to its own position.

        queries: [T, num_heads * head_dim], rows may be apart; cache: [cells, 2 * num_kv_heads * head_dim], keys first;
        out: [T, num_heads * head_dim], dense, written in place.
        """
        sizes = self.sizes
        heads = (len(queries), sizes.num_heads, sizes.head_dim)
        cells = cache.view(-1, self.block_size, 2, sizes.num_kv_heads, sizes.head_dim)
        keys_values = (cells.select(2, 0), cells.select(2, 1))
        self.wrapper.run(queries.view(heads), keys_values, out=out.view(heads))


class PromptAttention:
    """Plans the prompts of one model. Steps follow one another on one stream."""

    def __init__(self, sizes: AttentionSizes, device: torch.device) -> None:
        """Take room on the device. Raises FlashInferError where the library is missing or cannot serve the model."""
        _check(sizes)
        self._sizes = sizes
        self._device = device
        self._wrapper_class = _wrapper_class()
        self._workspace = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        # By window: a wrapper, and the end of its last plan's copies.
        self._wrappers: dict[int | None, tuple[Any, torch.cuda.Event | None]] = {}

    def plan(self, chunks: HostChunks, block_size: int, window: int | None) -> PlannedPrompts:
        """Make ready for layers with that window, of which a query sees as many keys, its own included.

        Good until the next plan with that window.
        """
        sizes, lengths = self._sizes, chunks.seq_lens.astype(np.int32)
        num_blocks = -(-lengths // block_size)
        is_own = np.arange(chunks.block_table.shape[1]) < num_blocks[:, None]
        wrapper, copied = self._wrapper(window)
        wrapper.plan(
            qo_indptr=self._pinned(chunks.query_start - chunks.query_start[0]),
            paged_kv_indptr=self._pinned(np.concatenate(([0], np.cumsum(num_blocks)))),
            paged_kv_indices=self._pinned(chunks.block_table[is_own]),
            paged_kv_last_page_len=self._pinned(lengths - (num_blocks - 1) * block_size),
            num_qo_heads=sizes.num_heads,
            num_kv_heads=sizes.num_kv_heads,
            head_dim_qk=sizes.head_dim,
            page_size=block_size,
            causal=True,
            sm_scale=sizes.scale,
            window_left=-1 if window is None else window - 1,  # keys before a query's own
            logits_soft_cap=sizes.cap,
            q_data_type=sizes.dtype,
            kv_data_type=sizes.dtype,
            seq_lens=self._pinned(lengths),
        )
        if copied is not None:
            copied.record()
        return PlannedPrompts(wrapper, sizes, block_size)

    def _wrapper(self, window: int | None) -> tuple[Any, torch.cuda.Event | None]:
        if window not in self._wrappers:
            event = torch.cuda.Event() if self._device.type == "cuda" else None  # type: ignore[no-untyped-call]
            self._wrappers[window] = (self._wrapper_class(self._workspace, "NHD"), event)
        wrapper, copied = self._wrappers[window]
        if copied is not None:
            copied.synchronize()  # launched before the last step with prompts: there is next to nothing to wait for
        return wrapper, copied

    def _pinned(self, numbers: NDArray[Any]) -> Tensor:
        host = torch.from_numpy(np.ascontiguousarray(numbers, np.int32))
        # torch keeps pinned memory until the copies that read it are done.
        return host.pin_memory() if self._device.type == "cuda" else host


def _check(sizes: AttentionSizes) -> None:
    if sizes.head_dim not in HEAD_DIMS:
        served = ", ".join(map(str, HEAD_DIMS))
        raise FlashInferError(f"its kernels have heads of {served} elements, this model of {sizes.head_dim}")
    if sizes.dtype not in DTYPES:
        raise FlashInferError(f"its kernels compute in float16 and bfloat16, this model in {sizes.dtype} (--dtype)")


def _wrapper_class() -> Any:
    try:
        # An optional package of GPU machines, and heavy.
        library = importlib.import_module("flashinfer")
    except ImportError as error:
        raise FlashInferError(f"it is not installed (pip install 'loraplex[flashinfer]'): {error}") from None
    return library.BatchPrefillWithPagedKVCacheWrapper
