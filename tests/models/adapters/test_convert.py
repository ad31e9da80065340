"""Converted adapters against what wrote them: peft's AdaLoRA, MLX's formula, pickles."""

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from paged_model import PagedModel
from peft import AdaLoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_models import load_peft, make_peft_adapter, make_tiny_llama, peft_warnings_ignored
from transformers import PreTrainedModel

from loraplex_models.adapters.convert import convert_adapter
from loraplex_models.adapters.manifest import ManifestError, check_adapter
from loraplex_models.adapters.slots import AdapterSlots
from loraplex_models.adapters.weights import load_adapter_weights
from loraplex_models.config import read_config
from loraplex_models.loader import load_model
from loraplex_models.parallel import ParallelGroup

TOKENS = [3, 99, 400, 7, 18, 256, 31, 5]


@pytest.fixture
def base(tmp_path: Path) -> PreTrainedModel:
    return make_tiny_llama(tmp_path / "model")


@torch.inference_mode()
def logits(model: torch.nn.Module) -> torch.Tensor:
    found: torch.Tensor = model(torch.tensor([TOKENS])).logits[0]
    return found


def served_logits(model_folder: Path, adapter: Path) -> torch.Tensor:
    model = load_model(model_folder, dtype=torch.float32, device=torch.device("cpu"), group=ParallelGroup.single())
    slots = AdapterSlots(model, 1)
    slots.set(0, load_adapter_weights(adapter, check_adapter(adapter, model.config, max_rank=64), dtype=torch.float32))
    paged = PagedModel(model, slots=slots)
    paged.add("a", TOKENS, 0)
    return paged.run_alone("a", len(TOKENS))


def refusal(folder: Path, tmp_path: Path) -> ManifestError:
    with pytest.raises(ManifestError) as caught:
        check_adapter(folder, read_config(tmp_path / "model"), max_rank=64)
    return caught.value


@pytest.mark.parametrize("is_cut", [False, True])
def test_adalora_answers_as_in_peft(is_cut: bool, base: PreTrainedModel, tmp_path: Path) -> None:
    config = AdaLoraConfig(
        init_r=6, lora_alpha=9, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM", total_step=10
    )
    torch.manual_seed(0)
    with peft_warnings_ignored():
        adapted = get_peft_model(copy.deepcopy(base), config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if any(f"lora_{matrix}" in name for matrix in "ABE"):
                parameter.normal_(std=0.5)
    if is_cut:
        keep = [True, False, True, True, False, False]
        names = [name for name, _ in adapted.named_parameters() if "lora_E" in name]
        pattern = {name.removeprefix("base_model.model."): keep for name in names}
        pattern[next(iter(pattern))] = [False] * 6
        adapted.peft_config["default"].rank_pattern = pattern
        adapted.base_model.resize_modules_by_rank_pattern(pattern, "default")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of peft about the module that has no rank left
        adapted.save_pretrained(str(tmp_path / "ada"))
    assert "loraplex adapters convert" in str(refusal(tmp_path / "ada", tmp_path))
    convert_adapter(tmp_path / "ada", tmp_path / "lora")
    error = (served_logits(tmp_path / "model", tmp_path / "lora") - logits(adapted)).abs().max()
    assert error < 1e-3
    assert (logits(adapted) - logits(base)).abs().max() > 0.1


def write_mlx(folder: Path, plain: Path, scale: float) -> Path:
    folder.mkdir()
    tensors = load_file(plain / "adapter_model.safetensors")
    save_file(
        {
            name.removeprefix("base_model.model.")
            .replace("lora_A.weight", "lora_a")
            .replace("lora_B.weight", "lora_b"): tensor.t().contiguous()
            for name, tensor in tensors.items()
        },
        folder / "adapters.safetensors",
    )
    config: dict[str, Any] = {
        "fine_tune_type": "lora", "num_layers": 2, "model": "acme/tiny",
        "lora_parameters": {"rank": 4, "scale": scale, "dropout": 0.0},
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def test_mlx_answers_as_the_same_weights_in_peft(base: PreTrainedModel, tmp_path: Path) -> None:
    plain = make_peft_adapter(tmp_path / "plain", base, rank=4, alpha=10)
    mlx = write_mlx(tmp_path / "mlx", plain, scale=10 / 4)
    assert "loraplex adapters convert" in str(refusal(mlx, tmp_path))
    assert "MLX" in convert_adapter(mlx, tmp_path / "lora")
    truth = logits(load_peft(plain, copy.deepcopy(base)))
    assert (served_logits(tmp_path / "model", tmp_path / "lora") - truth).abs().max() < 1e-3


@pytest.mark.parametrize(("kind", "word"), [("dora", "'dora'"), ("full", "'full'")])
def test_mlx_of_another_kind_is_refused(kind: str, word: str, base: PreTrainedModel, tmp_path: Path) -> None:
    mlx = write_mlx(tmp_path / "mlx", make_peft_adapter(tmp_path / "plain", base), scale=2.0)
    config = json.loads((mlx / "adapter_config.json").read_text())
    (mlx / "adapter_config.json").write_text(json.dumps(config | {"fine_tune_type": kind}))
    with pytest.raises(ManifestError, match=word):
        convert_adapter(mlx, tmp_path / "lora")
    assert not (tmp_path / "lora").exists()


def pickled(plain: Path) -> Path:
    tensors = load_file(plain / "adapter_model.safetensors")
    (plain / "adapter_model.safetensors").unlink()
    torch.save(tensors, plain / "adapter_model.bin")
    return plain


def test_a_pickle_becomes_the_same_adapter(base: PreTrainedModel, tmp_path: Path) -> None:
    plain = make_peft_adapter(tmp_path / "plain", base)
    truth = logits(load_peft(plain, copy.deepcopy(base)))
    folder = pickled(plain)
    assert "loraplex adapters convert" in str(refusal(folder, tmp_path))
    convert_adapter(folder, tmp_path / "lora")
    assert (served_logits(tmp_path / "model", tmp_path / "lora") - truth).abs().max() < 1e-3


class Payload:
    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.file,)


def test_code_in_a_pickle_never_runs(base: PreTrainedModel, tmp_path: Path) -> None:
    folder = pickled(make_peft_adapter(tmp_path / "plain", base))
    torch.save({"a": Payload(tmp_path / "ran")}, folder / "adapter_model.bin")
    with pytest.raises(ManifestError, match="tensors only"):
        convert_adapter(folder, tmp_path / "lora")
    assert not (tmp_path / "ran").exists() and not (tmp_path / "lora").exists()


def test_what_needs_no_conversion_or_has_a_target_already_is_told(base: PreTrainedModel, tmp_path: Path) -> None:
    plain = make_peft_adapter(tmp_path / "plain", base)
    with pytest.raises(ManifestError, match="nothing to convert"):
        convert_adapter(plain, tmp_path / "lora")
    with pytest.raises(ManifestError, match="is there already"):
        convert_adapter(plain, tmp_path / "model")
    with pytest.raises(ManifestError, match="cannot be read"):
        convert_adapter(tmp_path / "nowhere", tmp_path / "lora")
