"""Quantised checkpoints that other programs wrote: logits against theirs, answers with adapters against peft."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import EngineBench
from paged_model import PagedModel
from safetensors.torch import load_file, save_file
from slow_dequantization import FIXTURES, LINEARS, checkpoint_tensors, linear_tensors, quantization_of, slow_weight
from tiny_models import make_peft_adapter
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM
from truth import Truth

from loraplex_models.checkpoint import CheckpointError
from loraplex_models.decoder import CausalLM
from loraplex_models.loader import load_model
from loraplex_models.parallel import ParallelGroup

NUM_LAYERS = 2
# Their own kernels compute in half precision.
HALF_PRECISION = {
    "autoawq-gemm-g32",
    "gptqmodel-g3-32-asym",
    "gptqmodel-g3-32-v2",
    "gptqmodel-g4-32-act",
    "gptqmodel-g8-32-sym",
}
WITH_REFERENCE = sorted(path.parent.name for path in FIXTURES.glob("*/reference"))
ONE_OF_EACH = (
    "autogptq-b3-g32-act-asym",
    "gptqmodel-g4-32-v2",
    "autoawq-gemv-g32",
    "ct-gptq-w4a16-act",
    "ct-fp8-tensor-static",
    "transformers-fp8-block",
    "bnb-nf4-double",
    "bnb-fp4",
    "bnb-int8",
)


def load(folder: Path, dtype: torch.dtype = torch.float32) -> CausalLM:
    return load_model(folder, dtype=dtype, device=torch.device("cpu"), group=ParallelGroup.single())


def logits(folder: Path, token_ids: list[int] | None = None) -> Tensor:
    paged = PagedModel(load(folder))
    paged.add("a", token_ids or list(range(3, 60)))
    return paged.run_alone("a", 64)


def dequantized_model(folder: Path, **changes: Any) -> PreTrainedModel:
    """A transformers model with the fixture's weights, each linear taken apart by the slow loop."""
    raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    quantization = raw.pop("quantization_config")
    raw["_name_or_path"] = ""  # peft would ask the hub about it
    model_type = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen2": (Qwen2Config, Qwen2ForCausalLM)}
    config_class, model_class = model_type[raw["model_type"]]
    model = model_class(config_class(**(raw | {"attn_implementation": "eager", "dtype": "float32"} | changes)))
    tensors = checkpoint_tensors(folder)
    state = {name: tensor.float() for name, tensor in tensors.items() if name in model.state_dict()}
    if raw["tie_word_embeddings"]:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    for module in (f"model.layers.{i}.{name}" for i in range(NUM_LAYERS) for name in LINEARS):
        state[f"{module}.weight"] = slow_weight(quantization, linear_tensors(tensors, module)).float()
    model.load_state_dict(state)
    return model.eval()


def edited(name: str, folder: Path, edit: Callable[[dict[str, Tensor]], object]) -> Path:
    """A copy of a fixture with other tensors."""
    shutil.copytree(FIXTURES / name, folder, ignore=shutil.ignore_patterns("reference"))
    (file,) = folder.glob("*.safetensors")
    tensors = {key: tensor.clone() for key, tensor in load_file(file).items()}
    edit(tensors)
    save_file(tensors, file)
    return folder


@pytest.mark.parametrize("name", WITH_REFERENCE)
def test_logits_are_those_of_the_program_that_wrote_the_file(name: str) -> None:
    reference = load_file(FIXTURES / name / "reference" / "logits.safetensors")
    ours = logits(FIXTURES / name, reference["input_ids"][0].tolist())
    theirs = reference["logits"][0]
    tolerance = 1e-2 if name in HALF_PRECISION else 1e-4
    assert (ours - theirs).abs().max() < tolerance * theirs.abs().max()


def test_the_same_weights_in_both_awq_layouts_give_the_same_logits() -> None:
    assert torch.equal(logits(FIXTURES / "autoawq-gemv-g32"), logits(FIXTURES / "autoawq-gemm-g32"))


def test_the_same_weights_with_both_kinds_of_gptq_zeros_give_the_same_logits() -> None:
    assert torch.equal(logits(FIXTURES / "gptqmodel-g3-32-asym"), logits(FIXTURES / "gptqmodel-g3-32-v2"))
    v1, v2 = logits(FIXTURES / "gptqmodel-g4-32-asym"), logits(FIXTURES / "gptqmodel-g4-32-v2")
    assert torch.equal(v1, v2)
    # The same model in 8 bits is near; with the zeros off by one it would be no nearer than chance.
    assert (v1 - logits(FIXTURES / "gptqmodel-g8-32-sym")).abs().max() < 0.15


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_answers_with_and_without_adapters_are_those_of_peft_over_the_dequantised_weights(
    name: str, tmp_path: Path
) -> None:
    model = dequantized_model(FIXTURES / name)
    adapters = {
        "all": make_peft_adapter(tmp_path / "all", model, rank=4, seed=1),
        "mlp": make_peft_adapter(tmp_path / "mlp", model, rank=12, seed=2, target_modules=["down_proj", "q_proj"]),
    }
    bench, truth = EngineBench(FIXTURES / name, adapters), Truth(model, adapters)
    prompts = {None: [5, 9, 13, 200], "all": [7, 301, 44], "mlp": [400, 3, 3, 8, 90]}
    for adapter, prompt in prompts.items():
        bench.add(str(adapter), prompt, adapter)
    bench.run()
    for adapter, prompt in prompts.items():
        answer = bench.answer(str(adapter))
        assert truth.objection(adapter, prompt, answer, {2}) is None, f"{adapter}: {answer}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_quantised_model_computes_in_half_precision_too(dtype: torch.dtype) -> None:
    paged = PagedModel(load(FIXTURES / "autogptq-b4-g32-act-sym", dtype))
    paged.add("a", list(range(3, 60)))
    ours = paged.run_alone("a", 64)
    assert ours.dtype == torch.float32
    assert (ours.float() - logits(FIXTURES / "autogptq-b4-g32-act-sym")).abs().max() < 0.05


SMALL = (
    "autogptq-b3-g32-act-asym",
    "autogptq-b4-g32-act-sym",
    "autogptq-b4-gall-noact-asym",
    "gptqmodel-g4-32-v2",
    "autoawq-gemv-g32",
    "ct-gptq-w4a16-act",
    "bnb-int8",
)


@pytest.mark.parametrize("name", SMALL)
def test_in_bfloat16_the_numbers_stay_as_small_as_they_are(name: str) -> None:
    small, plain = load(FIXTURES / name, torch.bfloat16), load(FIXTURES / name)
    linear, widened = small.layers[0].mlp.linears[0], plain.layers[0].mlp.linears[0]
    # In float32 a number takes 32 bits, here 8 or 4 and its share of the scales.
    assert linear.num_bytes < widened.num_bytes * (0.27 if name == "bnb-int8" else 0.17)
    exact = widened.dequantize()
    assert (linear.dequantize() - exact).abs().max() < 2**-7 * exact.abs().max()
    for chunk in (1, 20, 57):
        paged = PagedModel(small)
        paged.add("a", list(range(3, 60)))
        ours, theirs = paged.run_alone("a", chunk).float(), logits(FIXTURES / name)
        assert (ours - theirs).abs().mean() < 0.03 * theirs.std()


@pytest.mark.parametrize("name", ["autogptq-b4-g32-act-sym", "autoawq-gemm-g32", "ct-gptq-w8a16", "bnb-nf4"])
def test_a_linear_that_was_left_plain_may_stand_beside_quantised_ones(name: str, tmp_path: Path) -> None:
    module = "model.layers.0.self_attn.k_proj"

    def leave_plain(tensors: dict[str, Tensor]) -> None:
        weight = slow_weight(quantization_of(FIXTURES / name), linear_tensors(tensors, module)).float()
        for key in [key for key in tensors if key.startswith(f"{module}.")]:
            del tensors[key]
        tensors[f"{module}.weight"] = weight

    folder = edited(name, tmp_path / "edited", leave_plain)
    assert (logits(folder) - logits(FIXTURES / name)).abs().max() < 1e-5


def test_a_bias_that_is_not_zero_is_added_though_the_config_names_none(tmp_path: Path) -> None:
    module = "model.layers.1.self_attn.v_proj"
    bias = torch.randn(64, generator=torch.Generator().manual_seed(5))
    name = "autogptq-b4-g32-act-sym"
    folder = edited(name, tmp_path / "edited", lambda t: t.update({f"{module}.bias": bias}))
    with torch.inference_mode():
        truth = dequantized_model(folder, attention_bias=True, mlp_bias=True)(torch.arange(3, 60)[None]).logits[0]
    assert (logits(folder) - truth).abs().max() < 1e-4
    assert (logits(folder) - logits(FIXTURES / name)).abs().max() > 1e-2


def test_a_family_with_biases_of_its_own_reads_them_beside_quantised_weights(tmp_path: Path) -> None:
    def add_biases(tensors: dict[str, Tensor]) -> None:
        for seed, key in enumerate(sorted(tensors)):
            if key.endswith(("q_proj.bias", "k_proj.bias", "v_proj.bias")):
                tensors[key] = torch.randn(tensors[key].shape, generator=torch.Generator().manual_seed(seed))

    folder = edited("autogptq-b4-g32-act-asym", tmp_path / "qwen2", add_biases)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config |= {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with torch.inference_mode():
        truth = dequantized_model(folder)(torch.arange(3, 60)[None]).logits[0]
    assert (logits(folder) - truth).abs().max() < 1e-4


def test_biases_of_zeros_take_no_memory() -> None:
    biased, plain = load(FIXTURES / "autogptq-b4-g32-act-sym"), load(FIXTURES / "gptqmodel-g4-32-act")
    assert biased.num_bytes == plain.num_bytes


def test_an_older_checkpoint_says_how_it_is_quantised_beside_its_config(tmp_path: Path) -> None:
    name = "autogptq-b4-g32-act-asym"
    shutil.copytree(FIXTURES / name, tmp_path / "old")
    for file, dropped in (("config.json", "quantization_config"), ("quantize_config.json", "quant_method")):
        content = json.loads((tmp_path / "old" / file).read_text(encoding="utf-8"))
        del content[dropped]
        (tmp_path / "old" / file).write_text(json.dumps(content), encoding="utf-8")
    assert torch.equal(logits(tmp_path / "old"), logits(FIXTURES / name))


def test_a_gptq_checkpoint_in_shards_is_found_by_its_index(tmp_path: Path) -> None:
    name, base = "autogptq-b4-g32-act-asym", "gptq_model-4bit-32g"
    shutil.copytree(FIXTURES / name, tmp_path / "shards")
    tensors = load_file(tmp_path / "shards" / f"{base}.safetensors")
    (tmp_path / "shards" / f"{base}.safetensors").unlink()
    weight_map = {}
    for shard in (0, 1):
        file = f"{base}-0000{shard + 1}-of-00002.safetensors"
        part = {key: tensors[key] for i, key in enumerate(sorted(tensors)) if i % 2 == shard}
        save_file(part, tmp_path / "shards" / file)
        weight_map |= dict.fromkeys(part, file)
    index = json.dumps({"weight_map": weight_map})
    (tmp_path / "shards" / f"{base}.safetensors.index.json").write_text(index, encoding="utf-8")
    assert torch.equal(logits(tmp_path / "shards"), logits(FIXTURES / name))


DOWN = "model.layers.0.mlp.down_proj"
DAMAGES: list[tuple[str, str, Callable[[Tensor], Tensor] | None, str]] = [
    ("autogptq-b4-g32-act-sym", "qweight", None, rf"no tensor '{DOWN}\.qweight'"),
    ("autogptq-b4-g32-act-sym", "qweight", lambda t: t[:31], r"qweight' has shape \[31, 128\].*\[32, 128\]"),
    ("autogptq-b4-g32-act-sym", "scales", lambda t: t[:7], r"scales' has shape \[7, 128\].*\[8, 128\]"),
    ("autogptq-b4-g32-act-sym", "scales", lambda t: t.long(), r"scales' is of torch\.int64"),
    ("autogptq-b4-g32-act-sym", "g_idx", lambda t: t + 1, rf"'{DOWN}': g_idx names groups outside 0 to 7"),
    ("autoawq-gemm-g32", "qzeros", None, r"no tensor .*qzeros"),
    ("autoawq-gemv-g32", "qzeros", lambda t: t[:, :1], r"qzeros' has shape \[128, 1\].*\[128, 4\]"),
    ("ct-gptq-w4a16-act", "weight_packed", lambda t: t[:, :-1], r"weight_packed' has shape \[128, 31\]"),
    ("ct-gptq-w4a16-act", "weight_shape", lambda t: t.flip(0), r"weight_shape says \[256, 128\].*\[128, 256\]"),
    ("bnb-nf4-double", "weight", lambda t: t[:-1], r"weight' has shape \[10239, 1\].*\[10240, 1\]"),
    ("bnb-nf4-double", "weight.absmax", lambda t: t[:-1], r"absmax has shape \[319\]"),
    ("bnb-nf4-double", "weight.nested_absmax", None, "no weight.nested_absmax"),
    ("bnb-int8", "SCB", lambda t: t[1:], r"SCB' has shape \[63\].*\[64\]"),
    ("bnb-int8", "weight_format", lambda t: t + 1, "weight_format is not 'row'"),
]


@pytest.mark.parametrize(("name", "suffix", "damage", "message"), DAMAGES)
def test_a_damaged_tensor_is_named(
    name: str, suffix: str, damage: Callable[[Tensor], Tensor] | None, message: str, tmp_path: Path
) -> None:
    def edit(tensors: dict[str, Tensor]) -> None:
        tensor = tensors.pop(f"{DOWN}.{suffix}")
        if damage is not None:
            tensors[f"{DOWN}.{suffix}"] = damage(tensor).contiguous()

    with pytest.raises(CheckpointError, match=message):
        load(edited(name, tmp_path / "edited", edit))


def test_a_group_size_that_is_not_the_files_is_refused(tmp_path: Path) -> None:
    shutil.copytree(FIXTURES / "autoawq-gemm-g32", tmp_path / "copy")
    config = json.loads((tmp_path / "copy" / "config.json").read_text(encoding="utf-8"))
    for size, message in ((64, r"qzeros' has shape \[4, 16\].*\[2, 16\]"), (48, "48 does not divide the 128 inputs")):
        config["quantization_config"]["group_size"] = size
        (tmp_path / "copy" / "config.json").write_text(json.dumps(config), encoding="utf-8")
        with pytest.raises(CheckpointError, match=message):
            load(tmp_path / "copy")


def test_a_checkpoint_of_plain_weights_that_calls_itself_quantised_is_refused(tmp_path: Path) -> None:
    model = dequantized_model(FIXTURES / "ct-gptq-w8a16")
    shutil.copytree(FIXTURES / "ct-gptq-w8a16", tmp_path / "plain")
    save_file(model.state_dict(), tmp_path / "plain" / "model.safetensors")
    with pytest.raises(CheckpointError, match="none of its linears is quantised"):
        load(tmp_path / "plain")
