"""The key forms of other trainers, brought to the served names."""

from pathlib import Path

import pytest
import torch
from adapter_files import PREFIX, base_config, config_fields, lora_tensors, write_adapter

from loraplex_models.adapters.manifest import AdapterManifest, ManifestError, check_adapter


def check(folder: Path) -> AdapterManifest:
    return check_adapter(folder, base_config(), max_rank=64)


def renamed(old: str, new: str) -> dict[str, torch.Tensor]:
    return {name.replace(old, new): tensor for name, tensor in lora_tensors().items()}


FORMS = {
    "no prefix": (PREFIX, ""),
    "inner model": (PREFIX, "base_model.model."),
    "model only": (PREFIX, "model."),
    "adapter name": (".weight", ".default.weight"),
    "other adapter name": (".weight", ".my-run.weight"),
    "compiled": (PREFIX, "base_model.model._orig_mod.model."),
    "compiled outside": (PREFIX, f"_orig_mod.{PREFIX}"),
    "ddp": (PREFIX, f"module.{PREFIX}"),
    "fsdp": ("layers.", "_fsdp_wrapped_module.layers._fsdp_wrapped_module."),
    "checkpointing": ("self_attn", "_checkpoint_wrapped_module.self_attn"),
    "vlm, new": (PREFIX, "base_model.model.model.language_model."),
    "vlm, old": (PREFIX, "base_model.model.language_model.model."),
    "vlm, no peft prefix": (PREFIX, "model.language_model."),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_pure_renaming_gives_the_same_modules(form: str, tmp_path: Path) -> None:
    plain = check(write_adapter(tmp_path / "plain"))
    manifest = check(write_adapter(tmp_path / "other", tensors=renamed(*FORMS[form])))
    assert manifest.modules.keys() == plain.modules.keys()
    assert any("normalised" in warning for warning in manifest.warnings)
    for name, entry in manifest.modules.items():
        assert (entry.rank, entry.scaling) == (plain.modules[name].rank, plain.modules[name].scaling)
        assert name.split(".")[-1] in entry.a_name


PARTS = {
    "model.layers.0.self_attn.q_proj.lora_magnitude_vector": (32,),
    "model.layers.0.mlp.down_proj.lora_magnitude_vector": (32,),
    "model.layers.1.self_attn.q_proj.lora_magnitude_vector": (32,),
    "model.layers.1.mlp.down_proj.lora_magnitude_vector": (32,),
    "lm_head.weight": (100, 32),
    "model.embed_tokens.token_adapter.trainable_tokens_delta": (2, 32),
}
RAW_FORMS = {
    "raw state": {
        ".lora_magnitude_vector": ".lora_magnitude_vector.default.weight",
        "lm_head.weight": "lm_head.modules_to_save.default.weight",
        "trainable_tokens_delta": "trainable_tokens_delta.default",
    },
    "older": {".lora_magnitude_vector": ".lora_magnitude_vector.weight"},
    "inner model": {"model.embed_tokens": "embed_tokens", "model.layers": "layers"},
    "vlm": {"model.embed_tokens": "model.language_model.embed_tokens", "model.layers": "model.language_model.layers"},
    "fsdp": {"lm_head.": "_fsdp_wrapped_module.lm_head."},
}


@pytest.mark.parametrize("form", RAW_FORMS)
def test_parts_beside_a_and_b_have_the_same_forms(form: str, tmp_path: Path) -> None:
    config = config_fields(use_dora=True, modules_to_save=["lm_head"], trainable_token_indices=[4, 9])
    plain = lora_tensors() | {f"base_model.model.{name}": torch.ones(shape) for name, shape in PARTS.items()}
    other = plain | {"base_model.model.lm_head.original_module.weight": torch.ones(100, 32)}
    for old, new in RAW_FORMS[form].items():
        other = {name.replace(old, new): tensor for name, tensor in other.items()}
    first = check(write_adapter(tmp_path / "plain", config, plain))
    second = check(write_adapter(tmp_path / "other", config, other))
    assert first.modules.keys() == second.modules.keys()
    assert all(entry.magnitude_name for entry in second.modules.values())
    assert second.head is not None and second.head.weight_name is not None
    assert second.embedding is not None and second.embedding.row_ids == (4, 9)
    assert second.dense_elements == first.dense_elements == 4 * 32 + 100 * 32 + 2 * 32


def test_patterns_match_the_name_below_peft_prefix_without_wrappers(tmp_path: Path) -> None:
    config = config_fields(alpha_pattern={r"^model\.layers\.0\.self_attn\.q_proj": 2})
    compiled = check(write_adapter(tmp_path / "a", config, renamed(PREFIX, "base_model.model._orig_mod.model.")))
    assert compiled.modules["layers.0.self_attn.q_proj"].scaling == 2 / 4
    inner = check(write_adapter(tmp_path / "b", config, renamed(PREFIX, "base_model.model.")))
    assert inner.modules["layers.0.self_attn.q_proj"].scaling == 8 / 4


def test_two_adapters_in_one_file_are_refused(tmp_path: Path) -> None:
    both = renamed(".weight", ".one.weight") | renamed(".weight", ".two.weight")
    with pytest.raises(ManifestError, match="more than one adapter"):
        check(write_adapter(tmp_path, tensors=both))


@pytest.mark.parametrize("layer", ["00", "-1", "x", "9999999"])
def test_a_layer_number_of_another_form_fits_nothing(layer: str, tmp_path: Path) -> None:
    with pytest.raises(ManifestError) as caught:
        check(write_adapter(tmp_path, tensors=renamed("layers.0.", f"layers.{layer}.")))
    assert caught.value.error_type == "adapter_incompatible"


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("layers.0.attn.q_proj.lora_a.weight", "torchtune"),
        ("model.layers.0.self_attn.q_proj.lora_a", "MLX"),
        ("model.decoder.layers.0.self_attention.linear_qkv.adapter.linear_in.weight", "NeMo"),
        ("lora_unet_down_blocks_0.lora_down.weight", "image model"),
    ],
)
def test_another_format_is_named(name: str, word: str, tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match=word) as caught:
        check(write_adapter(tmp_path, tensors={name: torch.ones(4, 4)}))
    assert caught.value.error_type == "adapter_unsupported"
