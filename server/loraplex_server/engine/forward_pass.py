"""From a plan to the logits of its sampled rows, in the way of the device that the model is on."""

import torch
from torch import Tensor

from loraplex_models.adapters.paged_slots import PagedAdapterSlots
from loraplex_models.adapters.slots import AdapterSlots
from loraplex_models.decoder import CausalLM
from loraplex_server.engine.batch_builder import BatchBuilder
from loraplex_server.engine.device_batch import DeviceBatchBuilder
from loraplex_server.engine.graphs import Capture, CudaCapture, StepGraphs, graph_sizes
from loraplex_server.engine.step import StepPlan

# How steps are made repeatable where there is no GPU; tests have them computed anew.
CAPTURE_ON_CPU: Capture | None = None


class ForwardPass:
    """One rank's model with its KV cache."""

    def __init__(
        self,
        model: CausalLM,
        slots: AdapterSlots,
        *,
        num_kv_blocks: int,
        block_size: int,
        max_batch_size: int,
        max_blocks: int,
        prefill_tokens: int,
    ) -> None:
        self._model = model
        self._slots = slots
        self._graphs: StepGraphs | None = None
        capture = CudaCapture() if model.device.type == "cuda" else CAPTURE_ON_CPU
        if not isinstance(slots, PagedAdapterSlots):
            self._kv_cache = model.new_kv_cache(num_kv_blocks, block_size)
            self._builder = BatchBuilder(max_batch_size, max_blocks, block_size, slots, model.device)
            return
        # One block more, for what rows without a sequence write.
        self._kv_cache = model.new_kv_cache(num_kv_blocks + 1, block_size)
        self._builder = DeviceBatchBuilder(max_batch_size, max_blocks, block_size, slots, model.device)
        if capture is not None and model.can_be_captured:
            self._graphs = StepGraphs(
                model,
                self._kv_cache,
                slots.captured_pages,
                sizes=graph_sizes(model, max_batch_size, prefill_tokens),
                max_blocks=max_blocks,
                spare_cell=num_kv_blocks * block_size,
                capture=capture,
            )

    def start_row(self, row: int) -> None:
        """A sequence enters a row."""
        self._builder.start_row(row)

    def warm_up(self) -> None:
        """Capture all graphs, so that no request waits for it."""
        if self._graphs is not None:
            with torch.inference_mode():
                self._graphs.capture_all()

    def run(self, plan: StepPlan, last_token_ids: Tensor | None = None) -> Tensor:
        """Return the logits of the rows that give some, [S, vocab], valid until the next step.

        last_token_ids: see `BatchBuilder.build`.
        """
        arrays = self._builder.arrays(plan)
        if self._graphs is not None and isinstance(self._slots, PagedAdapterSlots):
            used = {sequence.slot for sequence in plan.sequences if sequence.slot >= 0}
            if not self._slots.need_plain_steps(used):
                touched = self._slots.touched(used)
                logits = self._graphs.run(plan, arrays, touched=touched, last_token_ids=last_token_ids)
                if logits is not None:
                    return logits
        return self._model.forward(self._builder.batch(plan, arrays, last_token_ids), self._kv_cache)
