"""--attention-backend flashinfer at the start: what it cannot serve, or serves wrongly, is one line."""

from pathlib import Path
from typing import Any

import pytest
import torch
from flashinfer_stand_in import BatchPrefillWithPagedKVCacheWrapper, FlashInferStandIn
from tiny_models import make_tiny_llama
from triton_interpreter import needs_interpreter

from loraplex_kernels import dispatch, flashinfer_prompts
from loraplex_server.config import EngineConfig
from loraplex_server.engine.device import DeviceError
from loraplex_server.engine.process import load_base_model

pytestmark = needs_interpreter


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    make_tiny_llama(path, num_hidden_layers=1)
    return path


def config_of(folder: Path, **settings: Any) -> EngineConfig:
    return EngineConfig(
        model_path=str(folder), dtype="float32", device="cpu", attention_backend="flashinfer", **settings
    )


def refusal(folder: Path, **settings: Any) -> str:
    with pytest.raises(DeviceError) as refused:
        load_base_model(config_of(folder, **settings))
    return str(refused.value)


def test_a_cpu_a_missing_package_and_other_heads_are_refused_in_a_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = "; --attention-backend triton asks for no other package"
    start = "--attention-backend flashinfer: "
    assert refusal(folder) == f"{start}FlashInfer computes on GPUs, not on cpu{ours}"
    monkeypatch.setattr(dispatch, "INTERPRETS", True)
    assert refusal(folder) == f"{start}its kernels have heads of 64, 128, 256 elements, this model of 16{ours}"
    monkeypatch.setattr(flashinfer_prompts, "HEAD_DIMS", (16,))
    assert refusal(folder).startswith(f"{start}its kernels compute in float16 and bfloat16, this model in")
    monkeypatch.setattr(flashinfer_prompts, "DTYPES", (torch.float32,))
    assert refusal(folder).startswith(f"{start}it is not installed (pip install 'loraplex[flashinfer]')")


def test_it_attends_where_it_agrees_with_plain_torch(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "INTERPRETS", True)
    library = FlashInferStandIn(monkeypatch)
    assert load_base_model(config_of(folder)).prompt_attention is not None
    assert [wrapper.num_runs for wrapper in library.wrappers] == [1]  # compared once, with the one kind of layer


def test_where_it_differs_or_does_not_compile_the_start_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "INTERPRETS", True)
    FlashInferStandIn(monkeypatch)
    run = BatchPrefillWithPagedKVCacheWrapper.run

    def slightly_wrong(self: Any, *arguments: Any, out: torch.Tensor) -> None:
        run(self, *arguments, out=out)
        out[-1, 0, 0] += 0.01

    def no_compiler(self: Any, **settings: Any) -> None:
        raise RuntimeError("Ninja build failed")

    monkeypatch.setattr(BatchPrefillWithPagedKVCacheWrapper, "run", slightly_wrong)
    said = refusal(folder)
    assert "with window None it differs from plain torch by " in said and said.endswith("asks for no other package")
    assert load_base_model(config_of(folder, check_kernels=False)).prompt_attention is not None
    monkeypatch.setattr(BatchPrefillWithPagedKVCacheWrapper, "plan", no_compiler)
    assert "it cannot run here: Ninja build failed; --attention-backend triton" in refusal(folder)
