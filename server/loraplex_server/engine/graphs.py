"""Decode steps as CUDA graphs: one for each of a few batch sizes, with and without adapters, captured when first met.

A graph holds addresses, not numbers: which sequences, blocks and adapters a step has is read from the tensors of its
`FixedDecodes`. A batch runs in the smallest graph that it fits, so few graphs serve any batch, adapters and ranks.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from loraplex_kernels.lora_pages import LinearPages
from loraplex_models.decoder import CausalLM
from loraplex_models.layers.attention import KVCache
from loraplex_server.engine.batch_builder import StepArrays
from loraplex_server.engine.device_batch import FixedDecodes
from loraplex_server.engine.step import StepPlan

Replay = Callable[[], Tensor]
# Makes a forward pass over fixed tensors repeatable; on a GPU by capturing it.
Capture = Callable[[Callable[[], Tensor]], Replay]


def graph_sizes(max_batch_size: int) -> list[int]:
    """The batch sizes that have graphs: 1, 2, 4, then by 8 up to 64, then by 32."""
    ladder = [1, 2, 4, *range(8, 65, 8), *range(96, max_batch_size + 32, 32)]
    sizes = [size for size in ladder if size < max_batch_size]
    return [*sizes, max_batch_size]


class DecodeGraphs:
    """Runs steps of nothing but decodes, for a model whose forward pass asks nothing of the device."""

    def __init__(
        self,
        model: CausalLM,
        kv_cache: KVCache,
        pages: tuple[LinearPages | None, ...],
        *,
        max_batch_size: int,
        max_blocks: int,
        spare_cell: int,
        capture: Capture,
    ) -> None:
        """`pages`: see `PagedAdapterSlots.captured_pages`; `spare_cell`: a KV cell that nobody reads."""
        self._model = model
        self._kv_cache = kv_cache
        self._pages = pages
        self._max_blocks = max_blocks
        self._spare_cell = spare_cell
        self._capture = capture
        self._sizes = graph_sizes(max_batch_size)
        self._captured: dict[tuple[int, bool], tuple[FixedDecodes, Replay]] = {}

    def run(
        self, plan: StepPlan, arrays: StepArrays, *, has_adapters: bool, last_token_ids: Tensor | None = None
    ) -> Tensor | None:
        """Return the logits of a step's decodes, [B, vocab], valid until the next step; None where no graph fits it.

        last_token_ids: see `BatchBuilder.build`.
        """
        if plan.num_decodes != len(plan.sequences) or len(arrays.sample_rows) != plan.num_decodes:
            return None
        size = next(size for size in self._sizes if size >= plan.num_decodes)
        decodes, replay = self._graph(size, has_adapters)
        decodes.fill(arrays, last_token_ids)
        return replay()[: plan.num_decodes]

    def capture_all(self) -> None:
        """Capture every graph now, the largest first: the others then fit into its memory."""
        for size in reversed(self._sizes):
            for has_adapters in (True, False):
                self._graph(size, has_adapters)

    def _graph(self, size: int, has_adapters: bool) -> tuple[FixedDecodes, Replay]:
        if (size, has_adapters) not in self._captured:
            decodes = FixedDecodes(
                size, self._max_blocks, self._spare_cell, self._pages if has_adapters else (), self._model.device
            )
            replay = self._capture(lambda: self._model.forward(decodes.batch, self._kv_cache))
            self._captured[size, has_adapters] = (decodes, replay)
        return self._captured[size, has_adapters]


class CudaCapture:
    """Captures forward passes as CUDA graphs that share one memory pool; only one may be under way at a time."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, forward: Callable[[], Tensor]) -> Replay:
        """Run once, so that kernels are compiled and libraries have their workspaces, then capture."""
        forward()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        # Other threads pin memory and copy adapters meanwhile; by default that would break the capture.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            logits = forward()

        def replay() -> Tensor:
            graph.replay()
            return logits

        return replay


def run_again(forward: Callable[[], Tensor]) -> Replay:
    """In place of a capture, where there is no GPU: compute anew."""
    return forward
