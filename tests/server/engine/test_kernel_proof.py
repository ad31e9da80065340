"""A GPU on which kernels differ from plain torch is refused by name; one on which they agree is asked once."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources
from triton_interpreter import needs_interpreter

from loraplex_kernels import self_check
from loraplex_kernels.gpu import activation, attention, grouped_linear, kv_cache, lora, moe
from loraplex_kernels.self_check import Comparison, ModelSizes, compare_kernels
from loraplex_models.config import ModelConfig, parse_config
from loraplex_quant.config import ON_THE_FLY
from loraplex_server.engine.device import DeviceError
from loraplex_server.engine.kernel_proof import prove_kernels

CONFIG: ModelConfig = parse_config(
    {
        "architectures": ["LlamaForCausalLM"],
        "num_attention_heads": 2,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "vocab_size": 50,
        "dtype": "float32",
    }
)
CPU = torch.device("cpu")


@needs_interpreter
def test_a_kernel_that_is_slightly_wrong_is_the_one_that_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def plant(module: Any, name: str, fault: Callable[..., Tensor]) -> None:
        right = getattr(module, name)

        def wrong(*arguments: Any) -> Any:
            result = right(*arguments)
            fault(*arguments) if result is None else fault(result)
            return result

        monkeypatch.setattr(module, name, wrong)

    plant(lora, "expand_rows", lambda h, pages, tiles, delta: delta[-1].mul_(1.01))
    plant(kv_cache, "rotate_and_store", lambda qkv, cos, sin, cache, *_: cache[0].neg_())
    plant(attention, "decode_attention", lambda out: out[1, :3].add_(0.01))
    plant(activation, "gelu_and_mul", lambda out: out[0].fill_(float("nan")))
    plant(grouped_linear, "grouped_linear", lambda out: out[:, 7].zero_())
    plant(moe, "expert_linear", lambda out: out.copy_(out.roll(1, 0)))
    found = list(compare_kernels(CPU, torch.float32, ModelSizes(32, 16, 2, 1, 50, (4,), True)))
    names = {one.kernel for one in found if not one.is_near}
    attention_names = {f"attention of decodes{case}" for case in ("", ", a window", ", capped scores")}
    assert names == attention_names | {
        "LoRA in tiles of 16 rows", "LoRA in tiles of 64 rows", "KV write", "gelu_and_mul", "product with experts",
        *(f"product of {rows} with 4 bits" for rows in (1, 40, 100, 300)),
    }  # fmt: skip
    assert len(found) == 25


class Asked:
    """Stands for the comparisons: what they were asked about, and what they find."""

    def __init__(self, *found: Comparison) -> None:
        self.sizes: list[ModelSizes] = []
        self.found = found

    def __call__(self, device: torch.device, dtype: torch.dtype, sizes: ModelSizes) -> Iterator[Comparison]:
        self.sizes.append(sizes)
        yield from self.found


@pytest.fixture
def some_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A GPU by name alone; returns the folder of Triton's cache."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


NEAR, FAR = Comparison("rotary", 1e-6, 1e-4), Comparison("add_norm", 0.5, 1e-4)


def test_what_agreed_is_not_asked_again_until_something_changes(
    some_gpu: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = Asked(NEAR)
    monkeypatch.setattr(self_check, "compare_kernels", asked)
    for _ in range(2):
        prove_kernels(CONFIG, None, torch.float32, CPU)
    assert asked.sizes == [ModelSizes(32, 16, 2, 2, 50)]
    prove_kernels(CONFIG, None, torch.bfloat16, CPU)
    prove_kernels(CONFIG, ON_THE_FLY["int4"], torch.float32, CPU)
    assert len(asked.sizes) == 3 and asked.sizes[2].bits == (4,)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA L4")
    prove_kernels(CONFIG, None, torch.float32, CPU)
    assert len(asked.sizes) == 4
    assert [note.read_text() for note in some_gpu.iterdir()] == ["rotary: 1.0e-06\n"] * 4


def test_a_gpu_on_which_a_kernel_differs_is_refused_each_time(some_gpu: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(self_check, "compare_kernels", Asked(NEAR, FAR))
    for _ in range(2):
        with pytest.raises(
            DeviceError, match=r"NVIDIA H200.*add_norm by 5.0e-01, 1e-04 at most.*--device cpu"
        ) as error:
            prove_kernels(CONFIG, None, torch.float32, CPU)
        assert "rotary" not in str(error.value) and "\n" not in str(error.value)
    assert not some_gpu.exists()


def test_a_kernel_that_does_not_compile_is_a_line(some_gpu: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def compare(*_: object) -> Iterator[Comparison]:
        yield NEAR
        raise OutOfResources(300_000, 232_448, "shared memory")

    monkeypatch.setattr(self_check, "compare_kernels", compare)
    with pytest.raises(DeviceError, match="cannot run: out of resource: shared memory"):
        prove_kernels(CONFIG, None, torch.float32, CPU)
    assert not some_gpu.exists()


def test_a_cache_that_cannot_be_written_costs_a_comparison_at_each_start(
    some_gpu: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    some_gpu.write_text("a file where the folder should be")
    asked = Asked(NEAR)
    monkeypatch.setattr(self_check, "compare_kernels", asked)
    for _ in range(2):
        prove_kernels(CONFIG, None, torch.float32, CPU)
    assert len(asked.sizes) == 2 and "each start compares again" in caplog.text
