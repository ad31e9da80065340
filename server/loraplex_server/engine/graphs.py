"""Decode steps as CUDA graphs: one for each of a few batch sizes and sets of linears that adapters touch.

A graph holds addresses, not numbers: which sequences, blocks and adapters a step has is read from the tensors of its
`FixedDecodes`. A batch runs in the smallest graph that it fits, so few graphs serve any batch, adapters and ranks.
"""

from collections import Counter
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


# Sets of linears besides none and all that may have graphs of their own, and the steps after which one has.
MAX_OWN_SETS = 2
OFTEN = 50
# What adapters touch together differs from step to step where tenants differ: so many such sets are remembered.
MAX_COUNTED = 64


def num_own_sets(model: CausalLM) -> int:
    """How many sets may come to have graphs of their own: with several ranks none, which would capture at other steps.

    A capture runs the forward pass, and with it its exchanges; the parts of an adapter that ranks have may differ.
    """
    return MAX_OWN_SETS if model.group.size == 1 else 0


def graph_sizes(max_batch_size: int) -> list[int]:
    """The batch sizes that have graphs: 1, 2, 4, then by 8 up to 64, then by 32."""
    ladder = [1, 2, 4, *range(8, 65, 8), *range(96, max_batch_size + 32, 32)]
    sizes = [size for size in ladder if size < max_batch_size]
    return [*sizes, max_batch_size]


class TargetSets:
    """The sets of linears that graphs are captured for: none, all, and a few that steps had often.

    A set is what the adapters of a batch touch. Its batch runs in the graphs of the smallest known set that has all of
    it: kernels for more linears find no ranks there, which costs their launch and changes nothing.
    """

    def __init__(self, everything: frozenset[int], num_own: int) -> None:
        """`num_own`: how many sets besides none and all may come to have graphs of their own."""
        self._sets = [frozenset[int](), everything]
        self._most_sets = 2 + num_own
        self._num_steps = Counter[frozenset[int]]()
        self._chosen: dict[frozenset[int], frozenset[int]] = {}

    def choose(self, touched: frozenset[int]) -> frozenset[int]:
        """The smallest known set with all of `touched`, which becomes known by the OFTEN-th step that asks for it."""
        if len(self._sets) < self._most_sets and touched not in self._sets:
            self._num_steps[touched] += 1
            if self._num_steps[touched] == OFTEN:
                self._sets.append(touched)
                self._chosen.clear()
        if len(self._num_steps) > MAX_COUNTED:
            self._num_steps.clear()
        if touched not in self._chosen:
            if len(self._chosen) >= MAX_COUNTED:
                self._chosen.clear()
            self._chosen[touched] = min((known for known in self._sets if known >= touched), key=len)
        return self._chosen[touched]


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
        everything = frozenset(index for index, linear in enumerate(pages) if linear is not None)
        self._targets = TargetSets(everything, num_own_sets(model))
        self._captured: dict[tuple[int, frozenset[int]], tuple[FixedDecodes, Replay]] = {}
        self._everything = everything
        self._logits: Tensor | None = None

    def run(
        self, plan: StepPlan, arrays: StepArrays, *, touched: frozenset[int], last_token_ids: Tensor | None = None
    ) -> Tensor | None:
        """Return the logits of a step's decodes, [B, vocab], valid until the next step; None where no graph fits it.

        touched: the linears that the step's adapters touch, of those that have pages; last_token_ids: see
        `BatchBuilder.build`.
        """
        if plan.num_decodes != len(plan.sequences) or len(arrays.sample_rows) != plan.num_decodes:
            return None
        size = next(size for size in self._sizes if size >= plan.num_decodes)
        decodes, replay = self._graph(size, self._targets.choose(touched))
        decodes.fill(arrays, last_token_ids)
        return replay()[: plan.num_decodes]

    def capture_all(self) -> None:
        """Capture the graphs for any adapters and for none now, the largest first: the others then fit into its memory.

        Those of a set of linears of its own are captured when steps first need them.
        """
        for size in reversed(self._sizes):
            for linears in (self._everything, frozenset[int]()):
                self._graph(size, linears)

    @property
    def num_captured(self) -> int:
        """Graphs by now."""
        return len(self._captured)

    def _graph(self, size: int, linears: frozenset[int]) -> tuple[FixedDecodes, Replay]:
        if (size, linears) not in self._captured:
            pages = tuple(pages if index in linears else None for index, pages in enumerate(self._pages))
            decodes = FixedDecodes(
                size, self._max_blocks, self._spare_cell, pages if linears else (), self._model.device
            )
            self._captured[size, linears] = (decodes, self._capture(lambda: self._compute(decodes)))
        return self._captured[size, linears]

    def _compute(self, decodes: FixedDecodes) -> Tensor:
        """The logits, in the one place that all graphs share: only one has them at a time."""
        logits = self._model.forward(decodes.batch, self._kv_cache)
        if self._logits is None:
            self._logits = logits.new_empty(self._sizes[-1], logits.shape[1])
        shared = self._logits[: decodes.size]
        shared.copy_(logits)
        return shared


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
