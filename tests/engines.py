"""A real engine in this process: model, adapters and scheduler as the engine process builds them, without the link."""

import time
from collections import deque
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import torch
from truth import Answer

from loraplex_models.adapters.manifest import check_adapter
from loraplex_models.config import read_config
from loraplex_models.loader import load_model
from loraplex_models.parallel import ParallelGroup
from loraplex_server.adapter_spec import adapter_spec
from loraplex_server.config import AdapterConfig, EngineConfig
from loraplex_server.engine.engine import Engine
from loraplex_server.engine.executor import LocalExecutor
from loraplex_server.engine.memory import Limits, settle_limits
from loraplex_server.engine.process import build_engine
from loraplex_server.engine.step import StepPlan
from loraplex_server.engine.worker import StepResult, Worker
from loraplex_server.messages import AdapterSpec, EngineStats, GenerateRequest, SamplingParams, TokenOutput


def checked_spec(name: str, folder: Path, model_folder: Path) -> AdapterSpec:
    """The spec that the registry would give for a checked adapter."""
    return adapter_spec(name, str(folder), check_adapter(folder, read_config(model_folder), max_rank=512))


class LateExecutor(LocalExecutor):
    """A device that lags behind the host: adapters move when a step is launched, all else is done when it is collected.

    So copies on a stream of their own may be ahead of the steps by as much as they ever can.
    """

    def __init__(self, worker: Worker):
        super().__init__(worker)
        self._plans: deque[bytes] = deque()

    def launch(self, plan: StepPlan) -> None:
        """Move the adapters."""
        for operation in plan.adapter_ops:
            self._worker._apply(operation)
        self._plans.append(msgspec.msgpack.encode(msgspec.structs.replace(plan, adapter_ops=[])))

    def collect(self) -> StepResult:
        """Compute the step."""
        return self._worker.launch(msgspec.msgpack.decode(self._plans.popleft(), type=StepPlan)).read()


class EngineBench:
    """An engine, the adapters it may serve, and what it has answered so far."""

    def __init__(
        self,
        model_folder: Path,
        adapters: Mapping[str, Path],
        *,
        dtype: str = "float32",
        device: str = "cpu",
        quantize: str | None = None,
        by_transformers: bool = False,
        group: ParallelGroup | None = None,
        **settings: Any,
    ):
        """`settings`: as `start` takes them."""
        self._folder = model_folder
        self._dtype = dtype
        self._device = device
        self.model = load_model(
            model_folder,
            dtype=getattr(torch, dtype),
            device=torch.device(device),
            group=group or ParallelGroup.single(),
            quantize=quantize,
            by_transformers=by_transformers,
        )
        self.specs = {name: checked_spec(name, folder, model_folder) for name, folder in adapters.items()}
        self.start(**settings)

    def start(self, *, is_late: bool = False, **settings: Any) -> None:
        """Begin with a fresh engine over the same weights; `is_late`: on a device that lags behind."""
        config, limits = self.settle(**settings)
        self.engine: Engine = build_engine(config, self.model, limits)
        if is_late:
            assert isinstance(self.engine._executor, LocalExecutor)
            self.engine._executor = LateExecutor(self.engine._executor._worker)
        for spec in self.specs.values():
            self.engine.load_adapter(spec)
        self.outputs: dict[str, list[TokenOutput]] = {}
        self.stats: EngineStats | None = None

    def settle(
        self, *, max_resident_adapters: int = 8, host_memory: int = 2**30, **settings: Any
    ) -> tuple[EngineConfig, Limits]:
        """The config of an engine, and its limits; `host_memory`: bytes for adapters."""
        config = EngineConfig(
            model_path=str(self._folder),
            dtype=self._dtype,
            device=self._device,
            adapters=AdapterConfig(max_resident_adapters=max_resident_adapters, adapter_host_memory=str(host_memory)),
        )
        config = replace(config, **({"num_kv_blocks": 64} | settings))
        return config, settle_limits(config, self.model.config, self.model.kv_bytes_per_block(config.block_size))

    def add(self, request_id: str, prompt: list[int], adapter: str | None = None, **sampling: Any) -> None:
        """Send one request."""
        spec = self.specs[adapter] if adapter else None
        self.outputs[request_id] = []
        self.engine.add(
            GenerateRequest(
                request_id=request_id,
                prompt_token_ids=prompt,
                sampling=SamplingParams(**({"max_new_tokens": 8} | sampling)),
                adapter_id=adapter,
                adapter_digest=spec.digest if spec else None,
            )
        )

    def step(self) -> None:
        """One engine step; keeps what it said."""
        output = self.engine.step()
        if output is None:
            time.sleep(0.001)  # as the engine process does while an adapter is on its way
            return
        for token_output in output.outputs:
            self.outputs[token_output.request_id].append(token_output)
        self.stats = output.stats or self.stats

    def run(self) -> None:
        """Step until nothing is left to do."""
        while self.engine.has_work:
            self.step()

    def answer(self, request_id: str) -> Answer:
        """All tokens of a request that has ended."""
        outputs = self.outputs[request_id]
        assert outputs and outputs[-1].finish_reason, f"request {request_id} has not ended: {outputs}"
        assert outputs[-1].error is None, outputs[-1].error
        return Answer(
            token_ids=[t for o in outputs for t in o.token_ids],
            logprobs=[p for o in outputs for p in o.logprobs],
            finish_reason=outputs[-1].finish_reason,
        )
