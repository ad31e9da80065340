import hashlib
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from adapter_files import (
    CONFIG_FILE,
    PREFIX,
    WEIGHTS_FILE,
    base_config,
    config_fields,
    lora_tensors,
    write_adapter,
    write_raw_weights,
)
from safetensors.torch import load_file, save_file
from tiny_models import SEVEN_LINEARS, load_peft, make_peft_adapter, make_tiny_llama, unload_peft
from transformers import LlamaForCausalLM

from loraplex_models.adapters.manifest import ManifestError, check_adapter
from loraplex_models.adapters.weights import AdapterWeights, load_adapter_weights
from loraplex_models.config import read_config


def load(folder: Path, dtype: torch.dtype = torch.float32, **arguments: Any) -> AdapterWeights:
    manifest = check_adapter(folder, base_config(), max_rank=512, **arguments)
    return load_adapter_weights(folder, manifest, dtype=dtype)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, LlamaForCausalLM]:
    folder = tmp_path_factory.mktemp("base")
    return folder, make_tiny_llama(folder)


ADAPTERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rank 1": {"rank": 1},
    "rank 17": {"rank": 17},
    "rank 64": {"rank": 64, "alpha": 3},
    "rslora": {"rank": 8, "use_rslora": True},
    "rslora with patterns": {
        "use_rslora": True,
        "rank_pattern": {"q_proj": 2, "layers.1.mlp.down_proj": 9},
        "alpha_pattern": {"v_proj": 5},
    },
    # In the order that PEFT saves them in, which is by their text: a file's order decides.
    "overlapping patterns": {
        "rank_pattern": {
            r".*1\.mlp\..*": 3,
            "down_proj": 9,
            r"model\.layers\.\d+\.self_attn\.[qk]_proj": 2,
            "q_proj": 7,
            r"self_attn\..*": 6,
        },
        "alpha_pattern": {r".*1\..*_proj": 11, "down_proj": -4, "k.proj": 0.5, "model.layers.0.mlp.up_proj": 1},
    },
    "anchored pattern": {
        "rank_pattern": {r"^model\.layers\.0\.self_attn\.o_proj": 6, r"^model\.layers\.1\.mlp\..*": 2}
    },
    "q only": {"target_modules": ["q_proj"]},
    "q and v": {"target_modules": ["q_proj", "v_proj"]},
    "mlp only": {"target_modules": ["gate_proj", "up_proj", "down_proj"]},
    "one layer": {"layers_to_transform": [1]},
    "one module of one layer": {"target_modules": ["layers.0.self_attn.o_proj"]},
    "excluded modules": {"exclude_modules": ["k_proj"]},
    "no effect": {"alpha": 0},
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_b_times_a_is_pefts_delta(name: str, base: tuple[Path, LlamaForCausalLM], tmp_path: Path) -> None:
    base_folder, model = base
    folder = make_peft_adapter(tmp_path, model, **ADAPTERS[name])
    manifest = check_adapter(folder, read_config(base_folder), max_rank=64)
    weights = load_adapter_weights(folder, manifest, dtype=torch.float32)
    adapted = load_peft(folder, model)
    layers = {
        module_name.removeprefix("base_model.model.model."): module
        for module_name, module in adapted.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }
    try:
        assert weights.modules.keys() == layers.keys()
        for module_name, (a, b) in weights.modules.items():
            expected = layers[module_name].get_delta_weight("default")
            torch.testing.assert_close(b @ a, expected, rtol=1e-5, atol=1e-6)
            assert a.shape[0] == manifest.modules[module_name].rank == layers[module_name].r["default"]
    finally:
        unload_peft(adapted)
    assert weights.rank == max(a.shape[0] for a, _ in weights.modules.values())


@pytest.mark.parametrize(
    "stored", [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]
)
@pytest.mark.parametrize("served", [torch.float32, torch.float16, torch.bfloat16])
def test_stored_dtypes_are_cast_after_the_scaling(stored: torch.dtype, served: torch.dtype, tmp_path: Path) -> None:
    tensors = {name: tensor.to(stored) for name, tensor in lora_tensors().items()}
    weights = load(write_adapter(tmp_path, config_fields(lora_alpha=3), tensors), served)
    a, b = weights.modules["layers.0.mlp.down_proj"]
    name = f"{PREFIX}layers.0.mlp.down_proj"
    torch.testing.assert_close(a, tensors[f"{name}.lora_A.weight"].float().to(served), rtol=0, atol=0)
    torch.testing.assert_close(b, (tensors[f"{name}.lora_B.weight"].float() * 0.75).to(served), rtol=0, atol=0)


def test_each_ranks_rows_are_dense_and_the_memory_is_their_own(tmp_path: Path) -> None:
    weights = load(write_adapter(tmp_path))
    for a, b in weights.modules.values():
        for tensor in (a, b.t()):
            assert tensor.is_contiguous()
            assert tensor.untyped_storage().nbytes() == tensor.nbytes
    assert weights.num_bytes == sum(tensor.nbytes for tensor in lora_tensors().values())
    assert load(tmp_path, torch.bfloat16).num_bytes == weights.num_bytes // 2


def test_a_tensor_that_is_not_aligned_in_the_file_is_read_right(tmp_path: Path) -> None:
    tensors = lora_tensors(modules=("self_attn.q_proj",))
    folder = write_adapter(tmp_path, tensors=tensors)
    data, header = b"\0", {"model.layers.0.self_attn.q_proj.lora_velora_embed": ("U8", [1], 0, 1)}
    for name, tensor in tensors.items():
        raw = tensor.numpy().tobytes()
        header[name] = ("F32", list(tensor.shape), len(data), len(data) + len(raw))
        data += raw
    write_raw_weights(
        folder, {name: {"dtype": d, "shape": s, "data_offsets": [i, j]} for name, (d, s, i, j) in header.items()}, data
    )
    a, _ = load(folder).modules["layers.1.self_attn.q_proj"]
    assert torch.equal(a, tensors[f"{PREFIX}layers.1.self_attn.q_proj.lora_A.weight"])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("matrix", ["A", "B"])
def test_a_value_that_is_not_finite_is_refused_with_the_tensors_name(value: float, matrix: str, tmp_path: Path) -> None:
    tensors = lora_tensors()
    name = f"{PREFIX}layers.1.mlp.down_proj.lora_{matrix}.weight"
    tensors[name][1, 1] = value
    with pytest.raises(ManifestError, match="not finite") as caught:
        load(write_adapter(tmp_path, tensors=tensors))
    assert name in str(caught.value)
    assert caught.value.error_type == "adapter_invalid"


@pytest.mark.parametrize(
    ("fields", "name", "shape"),
    [
        ({"lora_bias": True}, "model.layers.0.self_attn.q_proj.lora_B.bias", (32,)),
        ({"bias": "all"}, "model.layers.0.self_attn.k_proj.bias", (16,)),
        ({"modules_to_save": ["lm_head"]}, "lm_head.weight", (100, 32)),
        ({"trainable_token_indices": [3]}, "model.embed_tokens.token_adapter.trainable_tokens_delta", (1, 32)),
        ({}, "lm_head.lora_A.weight", (4, 32)),
    ],
)
def test_a_value_that_is_not_finite_is_refused_in_parts_beside_a_and_b_too(
    fields: dict[str, Any], name: str, shape: tuple[int, ...], tmp_path: Path
) -> None:
    tensors = lora_tensors()
    if "lora_bias" in fields:
        tensors |= {key.replace("lora_B.weight", "lora_B.bias"): torch.ones(32) for key in tensors if "lora_B" in key}
    tensors["base_model.model." + name] = torch.ones(shape)
    if "lm_head.lora_A" in name:
        tensors["base_model.model.lm_head.lora_B.weight"] = torch.ones(100, 4)
    tensors["base_model.model." + name].view(-1)[-1] = float("nan")
    folder = write_adapter(tmp_path, config_fields(**fields), tensors)
    manifest = check_adapter(folder, base_config(), max_rank=64)
    with pytest.raises(ManifestError, match="not finite") as caught:
        load_adapter_weights(folder, manifest, dtype=torch.float32)
    assert name in str(caught.value)


def test_a_scaling_that_overflows_the_served_dtype_is_refused(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path, config_fields(lora_alpha=1e6))
    with pytest.raises(ManifestError, match="does not fit into torch"):
        load(folder, torch.float16)
    assert load(folder, torch.float32).rank == 4


def test_weights_that_changed_after_the_check_are_refused(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path)
    manifest = check_adapter(folder, base_config(), max_rank=64)
    tensors = load_file(folder / WEIGHTS_FILE)
    next(iter(tensors.values()))[0, 0] += 1
    save_file(tensors, folder / WEIGHTS_FILE)
    with pytest.raises(ManifestError, match="changed since they were checked"):
        load_adapter_weights(folder, manifest, dtype=torch.float32)


def test_a_config_that_changed_after_the_check_is_refused(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path)
    manifest = check_adapter(folder, base_config(), max_rank=64)
    (folder / CONFIG_FILE).write_text((folder / CONFIG_FILE).read_text().replace('"lora_alpha": 8', '"lora_alpha": 9'))
    with pytest.raises(ManifestError, match="changed since they were checked"):
        load_adapter_weights(folder, manifest, dtype=torch.float32)


def test_a_known_digest_of_other_weights_is_refused_at_load(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path)
    with pytest.raises(ManifestError, match="changed since they were checked"):
        load(folder, digest="0" * 64)


def test_a_manifest_of_another_layout_is_refused_though_its_digest_fits(tmp_path: Path) -> None:
    digest = check_adapter(write_adapter(tmp_path / "a"), base_config(), max_rank=64).digest
    other = write_adapter(tmp_path / "b", config_fields(lora_alpha=9))
    manifest = check_adapter(other, base_config(), max_rank=64, digest=digest)
    with pytest.raises(ManifestError, match="changed since they were checked"):
        load_adapter_weights(tmp_path / "a", manifest, dtype=torch.float32)


@pytest.mark.parametrize("name", [CONFIG_FILE, WEIGHTS_FILE])
def test_a_file_that_is_gone_is_named(name: str, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path)
    manifest = check_adapter(folder, base_config(), max_rank=64)
    (folder / name).unlink()
    with pytest.raises(ManifestError, match=name):
        load_adapter_weights(folder, manifest, dtype=torch.float32)


def test_the_digest_is_one_hash_over_config_header_and_tensors(tmp_path: Path) -> None:
    config, weights = ((write_adapter(tmp_path) / name).read_bytes() for name in (CONFIG_FILE, WEIGHTS_FILE))
    expected = hashlib.sha256(len(config).to_bytes(8, "little") + config + weights).hexdigest()
    assert load(tmp_path).digest == expected


@pytest.mark.parametrize("name", ["pirate", "json", "shout"])
def test_the_examples_adapt_all_seven_linears_of_every_layer(name: str) -> None:
    folder = Path(__file__).parents[3] / "examples" / "adapters" / name
    config = base_config(
        num_hidden_layers=30,
        hidden_size=576,
        num_attention_heads=9,
        num_key_value_heads=3,
        intermediate_size=1536,
        vocab_size=49152,
    )
    manifest = check_adapter(folder, config, max_rank=64, base_model_name="HuggingFaceTB/SmolLM2-135M-Instruct")
    assert manifest.warnings == []
    assert manifest.target_modules == tuple(sorted(SEVEN_LINEARS))
    assert len(load_adapter_weights(folder, manifest, dtype=torch.bfloat16).modules) == 30 * 7
