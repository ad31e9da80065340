"""What is set aside of a GPU's memory for its widest steps, measured here with allocators that stand in for a GPU's."""

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import make_tiny_llama
from torch.utils._python_dispatch import TorchDispatchMode
from triton_interpreter import needs_interpreter

from loraplex_kernels import dispatch
from loraplex_models.loader import load_model
from loraplex_models.parallel import ParallelGroup
from loraplex_server.config import AdapterConfig, EngineConfig
from loraplex_server.engine.graphs import MAX_OWN_SETS, MOST_CHUNKS, graph_sizes, most_graphs
from loraplex_server.engine.memory import GpuShares, NotEnoughMemory
from loraplex_server.engine.profile import GRAPH_BYTES, measure_steps, peak_of

MIB = 2**20


class ScriptedMemory:
    """An allocator whose user says what it takes and gives back; what was given back stays reserved until `release`."""

    def __init__(self) -> None:
        self.taken = self.held = self.peak = 0

    def take(self, num_bytes: int) -> None:
        self.taken += num_bytes
        self.held = max(self.held, self.taken)
        self.peak = max(self.peak, self.held)

    def free_and_total(self) -> tuple[int, int]:
        return 100 * MIB - self.held, 100 * MIB

    def reserved(self) -> int:
        return self.held

    def peak_reserved(self) -> int:
        return self.peak

    def release(self) -> None:
        self.held = self.peak = self.taken


def test_the_peak_is_what_work_takes_beyond_what_its_first_time_has_left_behind() -> None:
    memory = ScriptedMemory()
    memory.take(5)
    times = 0

    def work() -> None:
        nonlocal times
        if times == 0:
            memory.take(70)  # compiled kernels, workspaces
        times += 1
        for taken in (10, 30, -35, 20, -25):
            memory.take(taken)

    assert peak_of(memory, work) == 40
    assert memory.reserved() == 75


def shares(**changes: Any) -> GpuShares:
    parts: dict[str, Any] = {
        "total": 1000, "free": 800, "fraction": 1.0, "adapters": 100, "forward": 50, "sampling": 20, "graphs": 30,
        "spare": 10,
    }  # fmt: skip
    return GpuShares(**(parts | changes))


def test_the_cache_gets_what_all_others_leave_but_for_one_block() -> None:
    assert shares().kv_bytes(7, 2048, 64) == 800 - 100 - 50 - 20 - 30 - 10 - 7
    assert shares(fraction=0.9).kv_bytes(7, 2048, 64) == 483


@pytest.mark.parametrize("share", ["adapters", "forward", "sampling", "graphs", "spare"])
def test_every_share_is_the_caches_loss(share: str) -> None:
    before = getattr(shares(), share)
    assert shares(**{share: before + 11}).kv_bytes(7, 2048, 64) == shares().kv_bytes(7, 2048, 64) - 11


def test_a_gpu_with_nothing_left_is_refused_with_all_shares_and_their_flags() -> None:
    gpu = shares(**{name: getattr(shares(), name) * MIB for name in ("total", "free", "adapters", "forward", "graphs")})
    assert gpu.kv_bytes(8 * MIB, 2048, 64) > 0
    crowded = shares(
        total=1000 * MIB, free=200 * MIB, adapters=100 * MIB, forward=50 * MIB, graphs=46 * MIB, fraction=0.9
    )
    words = (
        r"1000 MiB 200 MiB are free.* 100 MiB are for adapters \(--adapter-device-memory\), 50 MiB for chunks of 2048 "
        r"tokens \(--max-batch-prefill-tokens\).*46 MiB for graphs \(--max-batch-size\), 100 MiB are for others "
        r"\(--cuda-memory-fraction 0\.9\).*112 MiB too much"
    )
    with pytest.raises(NotEnoughMemory, match=words):
        crowded.kv_bytes(8 * MIB, 2048, 64)


class CountedTensors(TorchDispatchMode):
    """Counts the bytes of all tensors that operations make, for as long as they live: the CPU as a GPU's allocator."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._storages: dict[int, int] = {}  # tensors that see it

    def __torch_dispatch__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for tensor in found if isinstance(found, (tuple, list)) else (found,):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor)
        return found

    def _count(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key, num_bytes = storage._cdata, storage.nbytes()
        if key not in self._storages:
            self.live += num_bytes
            self.peak = max(self.peak, self.live)
        self._storages[key] = self._storages.get(key, 0) + 1
        weakref.finalize(tensor, self._drop, key, num_bytes)

    def _drop(self, key: int, num_bytes: int) -> None:
        self._storages[key] -= 1
        if not self._storages[key]:
            del self._storages[key]
            self.live -= num_bytes

    def free_and_total(self) -> tuple[int, int]:
        return 0, 0

    def reserved(self) -> int:
        return self.live

    def peak_reserved(self) -> int:
        return self.peak

    def release(self) -> None:
        self.peak = self.live


@needs_interpreter
def test_the_profile_has_the_widest_steps_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_tiny_llama(tmp_path)
    model = load_model(tmp_path, dtype=torch.float32, device=torch.device("cpu"), group=ParallelGroup.single())
    monkeypatch.setattr(dispatch, "INTERPRETS", True)
    vocab, inner = model.config.vocab_size, model.config.intermediate_size

    def steps(**settings: Any) -> Any:
        adapters = AdapterConfig(max_resident_adapters=2, max_lora_rank=16)
        config = EngineConfig(max_batch_size=2, max_total_tokens=64, adapters=adapters, **settings)
        with CountedTensors() as memory:
            return measure_steps(config, model, memory)

    short = steps(max_batch_prefill_tokens=4)
    long = steps(max_batch_prefill_tokens=20, enable_prefill_logprobs=True)
    # The logits of all rows; the gate's and the up projection's outputs with their adapters' deltas.
    assert long.forward >= 22 * vocab * 4 and short.forward >= 6 * 2 * 2 * inner * 4
    assert long.forward - short.forward >= 16 * 2 * 2 * inner * 4
    sizes = graph_sizes(model, 2, 20)
    logits = (2 + MOST_CHUNKS) * vocab * 4  # shared by all graphs
    drivers = most_graphs(model, sizes) * GRAPH_BYTES
    assert drivers == (2 * 3 + 2 * MAX_OWN_SETS) * GRAPH_BYTES
    assert logits + drivers <= long.graphs < 4 * logits + drivers + MIB
    assert long.sampling >= 2 * 3 * vocab * 4 and long.sampling == short.sampling
