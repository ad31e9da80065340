"""A model of a named shape with random weights, an engine over it, and random adapters: no files, no network."""

import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from loraplex_kernels.dispatch import has_gpu_forms
from loraplex_models.adapters.paged_slots import AdapterRoom
from loraplex_models.adapters.weights import AdapterWeights
from loraplex_models.config import ModelConfig, read_config
from loraplex_models.cuts import Cut
from loraplex_models.decoder import CausalLM
from loraplex_models.parallel import ParallelGroup
from loraplex_models.registry import find_model_class
from loraplex_quant.grouped import GroupedWeight
from loraplex_quant.keep import Keeping
from loraplex_quant.method import LinearWeight
from loraplex_server.config import AdapterConfig, EngineConfig
from loraplex_server.engine.device_sampler import sampler_kind
from loraplex_server.engine.engine import Engine
from loraplex_server.engine.executor import LocalExecutor
from loraplex_server.engine.worker import Worker
from loraplex_server.messages import AdapterSpec, GenerateRequest, SamplingParams

COMMON = {"rms_norm_eps": 1e-5, "hidden_act": "silu", "tie_word_embeddings": False, "eos_token_id": 2}
SHAPES: dict[str, dict[str, Any]] = {
    "llama-3-8b": {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
        "rope_theta": 500000.0, "max_position_embeddings": 8192,
    },
    "qwen2.5-7b": {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": 3584, "intermediate_size": 18944,
        "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064,
        "rope_theta": 1000000.0, "max_position_embeddings": 32768,
    },
    "mistral-7b": {
        "architectures": ["MistralForCausalLM"], "model_type": "mistral", "hidden_size": 4096,
        "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
        "vocab_size": 32768, "rope_theta": 1000000.0, "max_position_embeddings": 32768, "sliding_window": None,
    },
    "1b": {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192,
        "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
        "rope_theta": 500000.0, "max_position_embeddings": 8192, "tie_word_embeddings": True,
    },
    "tiny": {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 96,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512,
        "rope_theta": 10000.0, "max_position_embeddings": 512,
    },
    "tiny128": {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 128, "intermediate_size": 256,
        "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512,
        "rope_theta": 10000.0, "max_position_embeddings": 512,
    },
}  # fmt: skip
SHAPES["4 layers"] = SHAPES["llama-3-8b"] | {"num_hidden_layers": 4}
WEIGHT_STD = 0.02
DEADLINE_S = 60.0  # for one measurement on a GPU: an engine that never ends must not take the run with it


def config_folder(shape: str) -> Path:
    """A folder with the shape's config.json."""
    folder = Path(tempfile.mkdtemp(prefix=f"{shape}-"))
    (folder / "config.json").write_text(json.dumps(COMMON | SHAPES[shape]))
    return folder


class RandomCheckpoint:
    """Stands in for a checkpoint: random tensors of the shapes that are asked for, the same for the same seed."""

    def __init__(self, dtype: torch.dtype, device: torch.device, *, seed: int, bits: int | None, std: float) -> None:
        """Numbers are drawn on `device`; with `bits` linears are quantised, in groups of 128."""
        self._generator = torch.Generator(device).manual_seed(seed)
        self._dtype, self._device, self._bits, self._std = dtype, device, bits, std

    def __contains__(self, name: str) -> bool:
        """Whether a tensor is there that a checkpoint need not have: a head's bias is not."""
        return not name.endswith("bias")

    def take(
        self, name: str, shape: tuple[int, ...], dtypes: Sequence[torch.dtype] = (), rows: Cut | None = None
    ) -> torch.Tensor:
        """A norm near 1, or weights around 0; all rows, as there is one rank."""
        assert rows is None or rows.size == shape[0]
        if "norm" in name:
            return torch.rand(shape, generator=self._generator, device=self._device).to(self._dtype) + 0.5
        return self._normal(shape)

    def linear(self, name: str) -> "RandomCheckpoint":
        """The tensors of a linear; as any others."""
        return self

    def read(self, in_size: int, out_size: int, has_bias: bool) -> LinearWeight:
        """A linear's weight and bias."""
        bias = self._normal((out_size,)) if has_bias else None
        if self._bits is None:
            return LinearWeight(self._normal((out_size, in_size)), bias)
        top = 1 << self._bits
        numbers = torch.randint(
            top, (out_size, in_size), generator=self._generator, device=self._device, dtype=torch.uint8
        )
        scales = torch.full((out_size, in_size // 128), 3 * self._std / top, device=self._device)
        return LinearWeight(GroupedWeight(self._bits, numbers, torch.full((1, 1), top // 2), scales), bias)

    def _normal(self, shape: tuple[int, ...]) -> torch.Tensor:
        numbers = torch.randn(shape, generator=self._generator, device=self._device, dtype=torch.float32)
        return numbers.mul_(self._std).to(self._dtype)


def random_model(
    shape: str, dtype: torch.dtype, device: torch.device, *, seed: int = 0, bits: int | None = None,
    source: torch.device | None = None, std: float = WEIGHT_STD,
) -> CausalLM:  # fmt: skip
    """A model of that shape on the device; `source`: where its numbers are drawn, which decides what they are."""
    config = read_config(config_folder(shape))
    model_class = find_model_class(config.architecture)
    assert model_class is not None
    model = model_class(config, Keeping(dtype, device), ParallelGroup.single())
    checkpoint: Any = RandomCheckpoint(dtype, source or device, seed=seed, bits=bits, std=std)
    with torch.inference_mode():
        for _ in model.load(checkpoint):
            pass
    return model


def random_adapter(
    config: ModelConfig, model: CausalLM, rank: int, seed: int, std: float = WEIGHT_STD
) -> AdapterWeights:
    """Random A and B of one rank on all linears, in host memory."""
    generator = torch.Generator().manual_seed(seed)
    modules = {}
    for site in model.lora_sites:
        a = torch.randn(rank, site.in_size, generator=generator).mul_(std).to(model.dtype)
        b = torch.randn(rank, site.out_size, generator=generator).mul_(std).to(model.dtype)
        modules[site.module] = (a, b.t())
    return AdapterWeights(f"adapter-{rank}-{seed}", rank, modules)


@dataclass(frozen=True, slots=True)
class World:
    """An engine, and the adapters that requests may name: by digest."""

    engine: Engine
    worker: Worker
    vocab_size: int
    deadline_s: float
    numbers: Iterator[int] = field(default_factory=lambda: iter(range(10**9)))

    def add(self, num_tokens: int, max_new_tokens: int, adapter: str | None, *, seed: int = 0) -> str:
        """Send one greedy request over a random prompt; returns its name."""
        number = next(self.numbers)
        prompt = torch.randint(
            3, self.vocab_size, (num_tokens,), generator=torch.Generator().manual_seed(seed or number)
        ).tolist()
        self.engine.add(
            GenerateRequest(
                request_id=str(number), prompt_token_ids=prompt, adapter_id=adapter, adapter_digest=adapter,
                sampling=SamplingParams(max_new_tokens=max_new_tokens, ignore_eos=True),
            )
        )  # fmt: skip
        return str(number)

    def run(self) -> Iterator[tuple[float, dict[str, list[int]]]]:
        """Step until nothing is left: the seconds of each step, and the tokens that it gave by request."""
        began = time.perf_counter()
        while self.engine.has_work:
            before = time.perf_counter()
            output = self.engine.step()
            after = time.perf_counter()
            if after - began > self.deadline_s:
                raise TimeoutError(f"a measurement took more than {self.deadline_s:.0f} s")
            outputs = [] if output is None else output.outputs
            for one in outputs:
                assert one.error is None, one.error
            yield after - before, {one.request_id: one.token_ids for one in outputs if one.token_ids}

    def answers(self) -> dict[str, list[int]]:
        """All tokens of each request, when nothing is left."""
        found: dict[str, list[int]] = {}
        for _, tokens in self.run():
            for name, ids in tokens.items():
                found.setdefault(name, []).extend(ids)
        return found


def make_world(
    model: CausalLM, adapters: dict[str, AdapterWeights], *, max_batch_size: int, max_total_tokens: int,
    num_slots: int, max_rank: int, max_prefill: int = 8192, adapter_memory: str = "24GiB",
    pinned_bytes: int = 0,
) -> World:  # fmt: skip
    """An engine over a model that is loaded already; `adapters`: what their digests stand for.

    Where kernels are those of a GPU, a step is launched before the one before is read, as the server does there.
    `pinned_bytes` of the host's memory are for adapters; the others lie in ordinary memory, which copies are slower
    from: pinning takes seconds, and only activation is measured by it.
    """
    config = EngineConfig(
        device=model.device.type, max_batch_size=max_batch_size, max_total_tokens=max_total_tokens,
        max_batch_prefill_tokens=max_prefill, prefix_caching=False, starvation_bound_s=60.0,
        adapters=AdapterConfig(
            max_resident_adapters=num_slots, max_lora_rank=max_rank, adapter_host_memory="64GiB",
            adapter_device_memory=adapter_memory,
        ),
    )  # fmt: skip
    num_kv_blocks = max_batch_size * -(-max_total_tokens // config.block_size) + 8
    sampler = sampler_kind(model.device)(
        max_batch_size, model.config.vocab_size, model.device, watermark_gamma=0.5, watermark_delta=2.0
    )
    worker = Worker(
        model, num_kv_blocks=num_kv_blocks, block_size=config.block_size, max_batch_size=max_batch_size,
        max_total_tokens=max_total_tokens, prefill_tokens=config.prefill_tokens, num_slots=num_slots,
        max_lora_rank=max_rank, sampler=sampler, read_adapter=lambda path: adapters[path],
        adapter_room=AdapterRoom(pinned_bytes),
    )  # fmt: skip
    engine = Engine(
        config, LocalExecutor(worker), num_kv_blocks=num_kv_blocks, end_token_ids=frozenset(),
        runs_ahead=has_gpu_forms(model.device),
    )  # fmt: skip
    for digest, weights in adapters.items():
        engine.load_adapter(
            AdapterSpec(adapter_id=digest, digest=digest, path=digest, rank=weights.rank, num_bytes=weights.num_bytes)
        )
    return World(engine, worker, model.config.vocab_size, DEADLINE_S if model.device.type == "cuda" else float("inf"))
