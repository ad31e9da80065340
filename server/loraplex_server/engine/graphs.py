"""Steps as CUDA graphs: decodes, alone or beside short chunks of prompts, one for each of a few sizes and sets of
linears that adapters touch.

A graph holds addresses, not numbers: which sequences, blocks and adapters a step has is read from the tensors of its
`FixedStep`. A step runs in the smallest graph that it fits, so few graphs serve any batch, adapters and ranks. Without
one a step takes as long as its launches do, some 10 ms for 32 layers, which is more than a short prompt's work.
"""

from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor

from loraplex_kernels.lora_pages import LinearPages
from loraplex_models.decoder import CausalLM
from loraplex_models.layers.attention import KVCache
from loraplex_server.engine.batch_builder import StepArrays
from loraplex_server.engine.device_batch import FixedStep, StepSize
from loraplex_server.engine.step import StepPlan

Replay = Callable[[], Tensor]
# Makes a forward pass over fixed tensors repeatable; on a GPU by capturing it.
Capture = Callable[[Callable[[], Tensor]], Replay]


# Prompt tokens of a step that has a graph, and its chunks at most; longer ones keep a GPU busy while they are launched.
CHUNK_TOKENS, MOST_CHUNKS = (64, 128, 256, 512), 8
FEW_DECODES = 16
# Sets of linears besides none and all that may have graphs of their own, and the steps after which one has.
MAX_OWN_SETS = 2
OFTEN = 50
# What adapters touch together differs from step to step where tenants differ: so many such sets are remembered.
MAX_COUNTED = 64


def graph_sizes(model: CausalLM, max_batch_size: int, prefill_tokens: int) -> list[StepSize]:
    """The steps that have graphs, from the smallest: decodes by 1, 2, 4, by 8 up to 64, then by 32; decodes and chunks.

    `prefill_tokens`: prompt tokens of a step at most. Chunks have none where FlashInfer attends, which plans each step.
    """
    ladder = [1, 2, 4, *range(8, 65, 8), *range(96, max_batch_size, 32)]
    decodes = [StepSize(size) for size in ladder if size < max_batch_size] + [StepSize(max_batch_size)]
    if model.prompt_attention is not None:
        return decodes
    tokens = [size for size in CHUNK_TOKENS if size <= prefill_tokens] or [prefill_tokens]
    beside = sorted({min(FEW_DECODES, max_batch_size), max_batch_size})
    return decodes + [StepSize(rows, MOST_CHUNKS, most) for most in tokens for rows in beside]


def most_graphs(model: CausalLM, sizes: list[StepSize]) -> int:
    """How many graphs there may come to be."""
    return 2 * len(sizes) + num_own_sets(model) * sum(not size.num_chunks for size in sizes)


def num_own_sets(model: CausalLM) -> int:
    """How many sets may come to have graphs of their own: with several ranks none, which would capture at other steps.

    A capture runs the forward pass, and with it its exchanges; the parts of an adapter that ranks have may differ.
    """
    return MAX_OWN_SETS if model.group.size == 1 else 0


class TargetSets:
    """The sets of linears that graphs are captured for: none, all, and for decodes alone a few that steps had often.

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


class StepGraphs:
    """Runs steps that fit a graph, for a model whose forward pass asks nothing of the device."""

    def __init__(
        self,
        model: CausalLM,
        kv_cache: KVCache,
        pages: tuple[LinearPages | None, ...],
        *,
        sizes: list[StepSize],
        max_blocks: int,
        spare_cell: int,
        capture: Capture,
    ) -> None:
        """`pages`: see `PagedAdapterSlots.captured_pages`; `sizes`: see `graph_sizes`; `spare_cell`: a KV cell that
        nobody reads.
        """
        self._model = model
        self._kv_cache = kv_cache
        self._pages = pages
        self._sizes = sizes
        self._max_blocks = max_blocks
        self._spare_cell = spare_cell
        self._capture = capture
        self._everything = frozenset(index for index, linear in enumerate(pages) if linear is not None)
        self._targets = TargetSets(self._everything, num_own_sets(model))
        self._captured: dict[tuple[StepSize, frozenset[int]], tuple[FixedStep, Replay]] = {}
        self._logits: Tensor | None = None

    def run(
        self, plan: StepPlan, arrays: StepArrays, *, touched: frozenset[int], last_token_ids: Tensor | None = None
    ) -> Tensor | None:
        """Return the logits of a step's sampled rows, [S, vocab], valid until the next step; None where no graph fits.

        touched: the linears that the step's adapters touch, of those that have pages; last_token_ids: see
        `BatchBuilder.build`.
        """
        num_decodes, num_chunks = plan.num_decodes, len(plan.sequences) - plan.num_decodes
        num_samples, num_tokens = len(arrays.sample_rows), len(arrays.token_ids) - num_decodes
        if num_samples > len(plan.sequences):
            return None  # some prompt's own tokens are wanted, too
        size = next((size for size in self._sizes if size.takes(num_decodes, num_chunks, num_tokens)), None)
        if size is None:
            return None
        wanted = self._everything if touched and num_chunks else touched
        step, replay = self._graph(size, self._targets.choose(wanted))
        step.fill(arrays, num_decodes, last_token_ids)
        return replay()[:num_samples]

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

    def _graph(self, size: StepSize, linears: frozenset[int]) -> tuple[FixedStep, Replay]:
        if (size, linears) not in self._captured:
            pages = tuple(pages if index in linears else None for index, pages in enumerate(self._pages))
            step = FixedStep(size, self._max_blocks, self._spare_cell, pages if linears else (), self._model.device)
            self._captured[size, linears] = (step, self._capture(lambda: self._compute(step)))
        return self._captured[size, linears]

    def _compute(self, step: FixedStep) -> Tensor:
        """The logits, in the one place that all graphs share: only one has them at a time."""
        logits = self._model.forward(step.batch, self._kv_cache)
        if self._logits is None:
            most_rows = max(size.num_decodes + size.num_chunks for size in self._sizes)
            self._logits = logits.new_empty(most_rows, logits.shape[1])
        shared = self._logits[: len(logits)]
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
