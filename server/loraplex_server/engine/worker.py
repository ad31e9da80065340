"""One rank: the model, its KV cache and its adapter slots. It obeys StepPlans and decides nothing."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from loraplex_models.adapters.merge_recipe import MergeRecipe
from loraplex_models.adapters.paged_slots import DEFAULT_ROOM, AdapterRoom, make_slots
from loraplex_models.adapters.row_sums import UnfinishedWeights
from loraplex_models.adapters.weights import AdapterWeights
from loraplex_models.decoder import CausalLM
from loraplex_models.parallel import ParallelGroup
from loraplex_server.engine.adapters.host_cache import HostCache
from loraplex_server.engine.forward_pass import ForwardPass
from loraplex_server.engine.row_results import PendingRows, RowResult, launch_choice
from loraplex_server.engine.sampled_tokens import TokenSampler
from loraplex_server.engine.step import AdapterOp, StepPlan


@dataclass(frozen=True, slots=True)
class StepResult:
    """A step's results by row, and where the host's time for it went; waiting for a GPU counts to the sampling."""

    rows: dict[int, RowResult]
    forward_s: float = 0.0
    sample_s: float = 0.0


@dataclass(frozen=True, slots=True)
class LaunchedStep:
    """A step whose work has been handed to the device; on a CPU it is done."""

    choice: PendingRows | None
    forward_s: float = 0.0
    sample_s: float = 0.0

    def read(self) -> StepResult:
        """Wait for the results. Once, and in the order of the launches."""
        if self.choice is None:
            return StepResult({}, self.forward_s, self.sample_s)
        began = time.perf_counter()
        rows = self.choice.read()
        return StepResult(rows, self.forward_s, self.sample_s + time.perf_counter() - began)


class Worker:
    """One rank's tensors. `read_adapter` turns an adapter's folder, or a recipe, into this rank's weights.

    Rank 0 of a group chooses the tokens; on the others steps have no results. With `shares_tokens` it tells the others'
    devices what it chose, for plans that were made before anybody has read it.
    """

    def __init__(
        self,
        model: CausalLM,
        *,
        num_kv_blocks: int,
        block_size: int,
        max_batch_size: int,
        max_total_tokens: int,
        prefill_tokens: int,
        num_slots: int,
        max_lora_rank: int,
        read_adapter: Callable[[str | MergeRecipe], AdapterWeights | UnfinishedWeights],
        sampler: TokenSampler,
        group: ParallelGroup | None = None,
        shares_tokens: bool = False,
        adapter_room: AdapterRoom = DEFAULT_ROOM,
    ):
        self._group = group or ParallelGroup.single()
        self._samples = self._group.rank == 0
        self._shares_tokens = shares_tokens
        self._slots = make_slots(model, num_slots, max_lora_rank, adapter_room)
        self.host_cache = HostCache(
            read_adapter,
            self._slots.arrange,
            self._slots.prepare,
            self._slots.drop,
            # A thread begins on the first GPU, whatever the rank's is.
            partial(torch.cuda.set_device, model.device) if model.device.type == "cuda" else lambda: None,
        )
        self._sampler = sampler
        self._pass = ForwardPass(
            model,
            self._slots,
            num_kv_blocks=num_kv_blocks,
            block_size=block_size,
            max_batch_size=max_batch_size,
            max_blocks=-(-max_total_tokens // block_size),
            prefill_tokens=prefill_tokens,
        )

    def warm_up(self) -> None:
        """Do what the first steps would otherwise wait for."""
        self._pass.warm_up()

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> LaunchedStep:
        """Begin one step: adapter operations, forward pass, choice of tokens; steps are done in this order."""
        for operation in plan.adapter_ops:
            self._apply(operation)
        for start in plan.row_starts:
            self._pass.start_row(start.row)
        if self._samples:
            self._note_rows(plan)
        if not plan.sequences:
            return LaunchedStep(None)
        began = time.perf_counter()
        logits = self._pass.run(plan, self._sampler.last_token_ids)
        computed = time.perf_counter()
        choice = launch_choice(self._sampler, plan, logits) if self._samples else None
        if self._shares_tokens:
            self._group.broadcast(self._sampler.last_token_ids)
        return LaunchedStep(choice, computed - began, time.perf_counter() - computed)

    def _apply(self, operation: AdapterOp) -> None:
        match operation.kind:
            case "host_load":
                self.host_cache.load(operation.digest, operation.merge or operation.path)
            case "host_evict":
                self.host_cache.evict(operation.digest)
            case "device_load":
                self.host_cache.prepare(operation.digest)
            case "slot_load":
                self._slots.install(operation.slot, self.host_cache.take_prepared(operation.digest))
            case "slot_clear":
                self._slots.clear(operation.slot)

    def _note_rows(self, plan: StepPlan) -> None:
        for row in plan.row_ends:
            self._sampler.remove(row)
        for start in plan.row_starts:
            self._sampler.add(start.row, start.sampling, start.token_ids, start.num_output_tokens)
