import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_files import (
    CONFIG_FILE,
    KEYS,
    NUM_LAYERS,
    PREFIX,
    SHAPES,
    VOCABULARY,
    WEIGHTS_FILE,
    base_config,
    config_fields,
    lora_tensors,
    write_adapter,
)

from loraplex_models.adapters.manifest import AdapterManifest, ManifestError, check_adapter

HEAD = "base_model.model."


def check(folder: Path, **arguments: Any) -> AdapterManifest:
    return check_adapter(folder, base_config(), **({"max_rank": 512} | arguments))


def refusal(folder: Path, **arguments: Any) -> tuple[str, str]:
    with pytest.raises(ManifestError) as caught:
        check(folder, **arguments)
    message = str(caught.value)
    assert "\n" not in message
    return caught.value.error_type, message


def test_a_plain_adapter_is_described_whole(tmp_path: Path) -> None:
    manifest = check(write_adapter(tmp_path), base_model_name="acme/tiny")
    assert (manifest.rank, manifest.alpha, manifest.target_modules) == (4, 8.0, ("down_proj", "q_proj"))
    assert sorted(manifest.modules) == [
        f"layers.{i}.{m}" for i in (0, 1) for m in ("mlp.down_proj", "self_attn.q_proj")
    ]
    entry = manifest.modules["layers.1.mlp.down_proj"]
    assert entry.a_name == f"{PREFIX}layers.1.mlp.down_proj.lora_A.weight"
    assert entry.b_name == f"{PREFIX}layers.1.mlp.down_proj.lora_B.weight"
    assert (entry.rank, entry.scaling, entry.dtype) == (4, 2.0, "F32")
    assert (entry.in_features, entry.out_features) == SHAPES["mlp.down_proj"]
    assert manifest.num_bytes == sum(tensor.nbytes for tensor in lora_tensors().values())
    assert manifest.warnings == []


@pytest.mark.parametrize("module", SHAPES)
def test_each_linear_may_be_the_only_one(module: str, tmp_path: Path) -> None:
    manifest = check(write_adapter(tmp_path, tensors=lora_tensors(modules=(module,))))
    assert list(manifest.modules) == [f"layers.{layer}.{module}" for layer in range(NUM_LAYERS)]


def test_one_layer_may_be_the_only_one(tmp_path: Path) -> None:
    tensors = {name: tensor for name, tensor in lora_tensors().items() if ".layers.1." in name}
    assert {name.split(".")[1] for name in check(write_adapter(tmp_path, tensors=tensors)).modules} == {"1"}


def test_the_digest_is_of_the_bytes_of_both_files(tmp_path: Path) -> None:
    first = check(write_adapter(tmp_path / "a"))
    assert check(write_adapter(tmp_path / "b")).digest == first.digest
    other_alpha = check(write_adapter(tmp_path / "c", config_fields(lora_alpha=9)))
    tensors = lora_tensors()
    next(iter(tensors.values()))[0, 0] += 1
    other_weights = check(write_adapter(tmp_path / "d", tensors=tensors))
    assert len({first.digest, other_alpha.digest, other_weights.digest}) == 3
    assert first.layout_digest == other_weights.layout_digest != other_alpha.layout_digest


def test_a_known_digest_is_taken_over(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path)
    manifest = check(folder)
    assert check(folder, digest=manifest.digest) == manifest


# Ranks and scalings


def test_rslora_divides_by_the_root_of_the_rank(tmp_path: Path) -> None:
    manifest = check(write_adapter(tmp_path, config_fields(use_rslora=True)))
    assert {entry.scaling for entry in manifest.modules.values()} == {8 / math.sqrt(4)}


def test_the_first_matching_pattern_wins(tmp_path: Path) -> None:
    tensors = lora_tensors(rank=4) | lora_tensors(rank=6, modules=("mlp.down_proj",))
    config = config_fields(
        rank_pattern={r"layers\.\d+\.mlp\..*": 6, "down_proj": 5},
        alpha_pattern={"model.layers.0.self_attn.q_proj": 2, "q_proj": 12, "proj": 99},
    )
    manifest = check(write_adapter(tmp_path, config, tensors))
    scalings = {name: (entry.rank, entry.scaling) for name, entry in manifest.modules.items()}
    assert scalings == {
        "layers.0.self_attn.q_proj": (4, 2 / 4),
        "layers.1.self_attn.q_proj": (4, 12 / 4),
        "layers.0.mlp.down_proj": (6, 8 / 6),
        "layers.1.mlp.down_proj": (6, 8 / 6),
    }
    assert manifest.rank == 6


def test_config_defaults_fill_what_a_short_config_leaves_out(tmp_path: Path) -> None:
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 16, "target_modules": ["q_proj"]}
    manifest = check(write_adapter(tmp_path, config))
    assert {entry.scaling for entry in manifest.modules.values()} == {4.0}
    assert check(write_adapter(tmp_path, {"peft_type": "LORA", "r": 4})).alpha == 8.0


@pytest.mark.parametrize("alpha", [0, -3, 0.5])
def test_alpha_may_be_zero_negative_or_broken(alpha: float, tmp_path: Path) -> None:
    manifest = check(write_adapter(tmp_path, config_fields(lora_alpha=alpha)))
    assert {entry.scaling for entry in manifest.modules.values()} == {alpha / 4}
    assert any("no effect" in warning for warning in manifest.warnings) == (alpha == 0)


@pytest.mark.parametrize("field", ["r", "lora_alpha"])
@pytest.mark.parametrize("value", ["8", True, None, [8], {}])
def test_a_field_of_the_wrong_type_is_named_with_its_value(field: str, value: Any, tmp_path: Path) -> None:
    kind, message = refusal(write_adapter(tmp_path, config_fields(**{field: value})))
    assert kind == "adapter_invalid"
    assert f"{CONFIG_FILE}: {field} is {value!r}" in message


@pytest.mark.parametrize(
    "fields",
    [
        {"r": 0}, {"r": -1}, {"r": 10**9}, {"r": 1e9}, {"lora_alpha": math.nan}, {"lora_alpha": math.inf},
        {"lora_alpha": 10**400}, {"rank_pattern": {"q_proj": 0}}, {"rank_pattern": {"q_proj": "4"}},
        {"rank_pattern": [4]}, {"rank_pattern": {"q_proj(": 4}}, {"rank_pattern": {"q_proj": 5}},
        {"alpha_pattern": {"q_proj": math.nan}}, {"alpha_pattern": {"x" * 600: 1}}, {"use_rslora": "yes"},
        {"fan_in_fan_out": 1}, {"peft_type": 7}, {"target_modules": [1]}, {"base_model_name_or_path": 3},
    ],
)  # fmt: skip
def test_a_value_that_cannot_be_is_invalid(fields: dict[str, Any], tmp_path: Path) -> None:
    kind, message = refusal(write_adapter(tmp_path, config_fields(**fields)))
    assert kind == "adapter_invalid"
    assert next(iter(fields)).removeprefix("lora_") in message


@pytest.mark.parametrize("key", ["(a+)+$", "(.*)*x", ".*.*.*.*q", "(?#[)(a+)+(?#])", "((a|b)*c)*", "(a|a){30}x"])
def test_a_pattern_that_could_take_very_long_is_refused(key: str, tmp_path: Path) -> None:
    kind, message = refusal(write_adapter(tmp_path, config_fields(rank_pattern={key: 4})))
    assert (kind, "rank_pattern" in message) == ("adapter_unsupported", True)


def test_a_rank_above_the_limit_is_too_large_and_says_what_it_needs(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path, config_fields(r=65), lora_tensors(rank=65))
    kind, message = refusal(folder, max_rank=64)
    assert kind == "adapter_too_large"
    assert "rank 65" in message
    assert "--max-lora-rank 65" in message
    assert f"{check(folder).num_bytes:,} bytes" in message
    assert check(folder, max_rank=65).rank == 65


def test_bytes_above_the_limit_are_too_large_and_say_what_they_need(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path, config_fields(r=512), lora_tensors(rank=512))
    kind, message = refusal(folder, max_bytes=2**19)
    assert kind == "adapter_too_large"
    assert f"{check(folder).num_bytes:,} bytes" in message
    assert "--max-adapter-mb 1" in message
    assert check(folder, max_bytes=2**20).rank == 512


# Features that are not served

UNSERVED = {
    "use_qalora": True, "kasa_config": {"beta": 0.1}, "arrow_config": {"top_k": 3},
    "layer_replication": [[0, 2], [1, 2]], "target_parameters": ["feed_forward.experts.gate_up_proj"],
    "modules_to_save": ["score"], "trainable_token_indices": {"model.wte": [5]},
}  # fmt: skip


@pytest.mark.parametrize("field", UNSERVED)
def test_a_field_that_would_change_the_output_is_refused_by_name(field: str, tmp_path: Path) -> None:
    kind, message = refusal(write_adapter(tmp_path, config_fields(**{field: UNSERVED[field]})))
    assert kind == "adapter_unsupported"
    assert message.startswith(f"{CONFIG_FILE}: {field} is {UNSERVED[field]!r}: ")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"bias": "everything"}, "bias is 'everything'"),
        ({"bias": 1}, "bias is 1"),
        ({"use_dora": "yes"}, "use_dora is 'yes'"),
        ({"use_dora": True}, "use_dora is true, and layers.0.mlp.down_proj has no tensor for it"),
        ({"lora_bias": True}, "lora_bias is true, and layers.0.mlp.down_proj has no tensor for it"),
        ({"use_dora": True, "lora_bias": True}, "exclude each other"),
        ({"use_dora": True, "alora_invocation_tokens": [1]}, "exclude each other"),
        ({"use_bdlora": {"nblocks": 0}}, "nblocks is 0"),
        ({"use_bdlora": True}, "use_bdlora is True"),
        ({"use_bdlora": {"nblocks": 2, "target_modules_bd_a": ["down"], "target_modules_bd_b": ["proj"]}}, "both"),
        ({"modules_to_save": ["lm_head"]}, "the file has no copy of it"),
        ({"modules_to_save": "lm_head"}, "modules_to_save is 'lm_head'"),
        ({"trainable_token_indices": [5]}, "the file has no rows of it"),
        ({"trainable_token_indices": [5, 5]}, "named twice"),
        ({"trainable_token_indices": [-1]}, "a list of token ids"),
        ({"alora_invocation_tokens": "<think>"}, "a list of token ids"),
        ({"ensure_weight_tying": 3}, "ensure_weight_tying is 3"),
    ],
)
def test_a_feature_that_cannot_be_as_the_config_says_is_invalid(
    fields: dict[str, Any], words: str, tmp_path: Path
) -> None:
    kind, message = refusal(write_adapter(tmp_path, config_fields(**fields)))
    assert (kind, words in message) == ("adapter_invalid", True), message


@pytest.mark.parametrize(
    "fields", [{"bias": "all"}, {"modules_to_save": ["lm_head"]}, {"trainable_token_indices": [5]}]
)
def test_what_would_act_before_the_invocation_is_refused_with_it(fields: dict[str, Any], tmp_path: Path) -> None:
    kind, message = refusal(write_adapter(tmp_path, config_fields(alora_invocation_tokens=[7], **fields)))
    assert (kind, "alora_invocation_tokens" in message) == ("adapter_unsupported", True)


def test_an_activated_adapter_names_its_invocation(tmp_path: Path) -> None:
    manifest = check(write_adapter(tmp_path, config_fields(alora_invocation_tokens=[7, 8])))
    assert manifest.invocation_token_ids == (7, 8) and not manifest.is_plain


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_16", "olora", "corda", "loftq", "PiSSA"])
def test_an_initialisation_that_changed_the_base_is_refused_with_the_conversion(init: str, tmp_path: Path) -> None:
    kind, message = refusal(write_adapter(tmp_path, config_fields(init_lora_weights=init)))
    assert kind == "adapter_unsupported"
    assert "init_lora_weights" in message
    assert "path_initial_model_for_weight_conversion" in message


def test_an_unknown_initialisation_is_refused(tmp_path: Path) -> None:
    kind, message = refusal(write_adapter(tmp_path, config_fields(init_lora_weights="new_trick")))
    assert (kind, "'new_trick'" in message) == ("adapter_unsupported", True)


@pytest.mark.parametrize("init", [True, False, None, "gaussian", "eva", "orthogonal", "mica", "lora_ga"])
def test_other_initialisations_are_plain_lora(init: Any, tmp_path: Path) -> None:
    assert check(write_adapter(tmp_path, config_fields(init_lora_weights=init))).rank == 4


@pytest.mark.parametrize(
    "method", ["IA3", "PREFIX_TUNING", "PROMPT_TUNING", "OFT", "XLORA", "ADALORA", "VERA", "LOKR", "NEW_METHOD"]
)
def test_another_method_is_refused_by_name(method: str, tmp_path: Path) -> None:
    kind, message = refusal(write_adapter(tmp_path, config_fields(peft_type=method)))
    assert (kind, f"peft_type is '{method}'" in message) == ("adapter_unsupported", True)
    assert ("convert" in message) == (method in ("ADALORA", "VERA", "LOKR"))


def test_a_missing_method_is_lora_when_its_tensors_are(tmp_path: Path) -> None:
    config = config_fields()
    del config["peft_type"]
    assert "no peft_type" in check(write_adapter(tmp_path / "a", config)).warnings[0]
    other = write_adapter(tmp_path / "b", config, {f"{PREFIX}layers.0.ia3_l": torch.ones(2)})
    assert refusal(other)[0] == "adapter_unsupported"


@pytest.mark.parametrize(
    ("task", "kind"),
    [
        ("SEQ_CLS", "adapter_unsupported"), ("TOKEN_CLS", "adapter_unsupported"),
        ("FEATURE_EXTRACTION", "adapter_unsupported"), ("QUESTION_ANS", "adapter_unsupported"),
        ("SEQ_2_SEQ_LM", "adapter_incompatible"), ("DREAM", "adapter_unsupported"),
    ],
)  # fmt: skip
def test_another_task_is_refused(task: str, kind: str, tmp_path: Path) -> None:
    found, message = refusal(write_adapter(tmp_path, config_fields(task_type=task)))
    assert (found, "task_type" in message) == (kind, True)


@pytest.mark.parametrize(
    ("name", "shape", "reason"),
    [
        ("model.layers.0.self_attn.q_proj.lora_E", (4, 1), "AdaLoRA"),
        ("model.layers.0.self_attn.q_proj.lora_diag", (4,), "KaSA"),
        ("score.weight", (2, 32), "modules_to_save"),
        ("model.layers.0.mlp.experts.7.w1.lora_A.weight", (4, 32), "experts"),
        ("model.layers.0.self_attn.q_proj.hada_w1_a", (4, 32), "another method"),
    ],
)
def test_a_tensor_of_an_unserved_feature_is_refused_by_name(
    name: str, shape: tuple[int, ...], reason: str, tmp_path: Path
) -> None:
    kind, message = refusal(write_adapter(tmp_path, tensors=lora_tensors() | {HEAD + name: torch.ones(shape)}))
    assert kind == "adapter_unsupported"
    assert name in message
    assert reason in message


@pytest.mark.parametrize(
    ("name", "shape", "words"),
    [
        ("model.layers.0.self_attn.q_proj.lora_magnitude_vector", (32,), "does not say use_dora true"),
        ("model.layers.0.self_attn.q_proj.lora_B.bias", (32,), "does not say lora_bias true"),
        ("model.layers.0.self_attn.k_proj.lora_magnitude_vector", (16,), "has no lora_A beside it"),
        ("model.layers.0.self_attn.q_proj.base_layer.bias", (32,), "says bias 'none'"),
        ("model.layers.0.self_attn.k_proj.bias", (16,), "says bias 'none'"),
        ("model.embed_tokens.lora_embedding_A", (4, VOCABULARY), "has no lora_B beside it"),
        ("lm_head.lora_A.weight", (4, 32), "has no lora_B beside it"),
    ],
)
def test_a_tensor_that_the_config_does_not_explain_is_invalid(
    name: str, shape: tuple[int, ...], words: str, tmp_path: Path
) -> None:
    kind, message = refusal(write_adapter(tmp_path, tensors=lora_tensors() | {HEAD + name: torch.ones(shape)}))
    assert kind == "adapter_invalid"
    assert name in message
    assert words in message


@pytest.mark.parametrize(
    ("fields", "name", "shape"),
    [
        ({"bias": "all"}, "model.layers.0.self_attn.k_proj.bias", (17,)),
        ({"trainable_token_indices": [3]}, "model.embed_tokens.token_adapter.trainable_tokens_delta", (2, 32)),
        ({"trainable_token_indices": [VOCABULARY]}, "model.embed_tokens.token_adapter.trainable_tokens_delta", (1, 32)),
        ({"modules_to_save": ["lm_head"]}, "lm_head.weight", (VOCABULARY, 33)),
    ],
)
def test_a_part_of_another_size_is_incompatible(
    fields: dict[str, Any], name: str, shape: tuple[int, ...], tmp_path: Path
) -> None:
    tensors = lora_tensors() | {HEAD + name: torch.ones(shape)}
    assert refusal(write_adapter(tmp_path, config_fields(**fields), tensors))[0] == "adapter_incompatible"


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("model.embed_tokens.weight", (VOCABULARY + 10, 32)),
        ("model.embed_tokens.base_layer.weight", (VOCABULARY + 10, 32)),
        ("lm_head.modules_to_save.weight", (VOCABULARY + 10, 32)),
        ("lm_head.lora_B.weight", (VOCABULARY + 10, 4)),
        ("model.embed_tokens.lora_embedding_A", (4, VOCABULARY + 10)),
    ],
)
def test_another_vocabulary_is_incompatible_with_both_sizes(name: str, shape: tuple[int, int], tmp_path: Path) -> None:
    kind, message = refusal(write_adapter(tmp_path, tensors=lora_tensors() | {HEAD + name: torch.ones(shape)}))
    assert kind == "adapter_incompatible"
    assert str(VOCABULARY) in message
    assert str(VOCABULARY + 10) in message


def test_tensors_that_inference_does_not_read_are_left_out(tmp_path: Path) -> None:
    extra = {
        f"{PREFIX}layers.0.self_attn.q_proj.lora_velora_embed": torch.ones(3),
        f"{PREFIX}layers.0.self_attn.q_proj.lora_monteclora_sampler.x": torch.ones(3),
        f"{HEAD}lm_head.original_module.weight": torch.ones(VOCABULARY, 32),
    }
    assert len(check(write_adapter(tmp_path, tensors=lora_tensors() | extra)).modules) == 4


def test_a_copy_of_the_base_embeddings_is_left_out_with_a_warning(tmp_path: Path) -> None:
    copy = {f"{PREFIX}embed_tokens.base_layer.weight": torch.ones(VOCABULARY, 32)}
    manifest = check(write_adapter(tmp_path, tensors=lora_tensors() | copy))
    assert any("embed_tokens.base_layer.weight" in warning for warning in manifest.warnings)


# Fitting the base


def test_another_models_adapter_lists_what_was_seen_and_expected(tmp_path: Path) -> None:
    names = [f"base_model.model.transformer.h.{i}.attn.c_attn" for i in range(5)]
    tensors = {f"{name}.lora_{m}.weight": torch.ones(4, 4) for name in names for m in "AB"}
    kind, message = refusal(write_adapter(tmp_path, tensors=tensors))
    assert kind == "adapter_incompatible"
    assert message.count("c_attn") == 3
    assert message.count(f"{PREFIX}layers.0.self_attn.") == 3
    assert "acme/tiny" in message


def test_no_tensors_at_all_is_incompatible(tmp_path: Path) -> None:
    assert refusal(write_adapter(tmp_path, tensors={}))[0] == "adapter_incompatible"


def test_three_hundred_unknown_tensors_are_counted_and_ten_named(tmp_path: Path) -> None:
    unknown = {f"vision_tower.block.{i}.weight": torch.ones(1) for i in range(300)}
    kind, message = refusal(write_adapter(tmp_path, tensors=lora_tensors() | unknown))
    assert kind == "adapter_incompatible"
    assert "300 tensors" in message
    assert message.count("vision_tower") == 10
    assert "290 more" in message


def test_a_layer_that_the_base_lacks_is_incompatible(tmp_path: Path) -> None:
    tensors = {name.replace("layers.1.", "layers.2."): tensor for name, tensor in lora_tensors().items()}
    kind, message = refusal(write_adapter(tmp_path, tensors=tensors))
    assert kind == "adapter_incompatible"
    assert "layer 2" in message
    assert "layers 0 to 1" in message


@pytest.mark.parametrize("matrix", ["A", "B"])
def test_another_size_names_module_expected_and_found(matrix: str, tmp_path: Path) -> None:
    tensors = lora_tensors(modules=("self_attn.k_proj",))
    tensors[f"{PREFIX}layers.1.self_attn.k_proj.lora_{matrix}.weight"] = torch.ones(
        (4, 33) if matrix == "A" else (KEYS + 1, 4)
    )
    kind, message = refusal(write_adapter(tmp_path, tensors=tensors))
    assert kind == "adapter_incompatible"
    assert "layers.1.self_attn.k_proj" in message
    assert f"B [{KEYS}, rank]" in message
    assert ("[4, 33]" if matrix == "A" else f"[{KEYS + 1}, 4]") in message


def test_half_a_pair_is_named(tmp_path: Path) -> None:
    for matrix, other in (("A", "B"), ("B", "A")):
        tensors = lora_tensors()
        del tensors[f"{PREFIX}layers.0.mlp.down_proj.lora_{other}.weight"]
        kind, message = refusal(write_adapter(tmp_path, tensors=tensors))
        assert kind == "adapter_invalid"
        assert f"layers.0.mlp.down_proj.lora_{matrix}.weight' has no lora_{other}" in message


def test_different_ranks_of_a_pair_are_named(tmp_path: Path) -> None:
    tensors = lora_tensors()
    tensors[f"{PREFIX}layers.0.self_attn.q_proj.lora_B.weight"] = torch.ones(32, 5)
    kind, message = refusal(write_adapter(tmp_path, tensors=tensors))
    assert (kind, "A has rank 4 and B 5" in message) == ("adapter_invalid", True)


def test_a_rank_that_config_and_file_disagree_on_is_invalid(tmp_path: Path) -> None:
    kind, message = refusal(write_adapter(tmp_path, config_fields(r=8)))
    assert kind == "adapter_invalid"
    assert "rank 4" in message
    assert "says 8" in message


def test_tensors_emptied_by_zero_3_are_explained(tmp_path: Path) -> None:
    tensors = lora_tensors()
    name = f"{PREFIX}layers.0.self_attn.q_proj.lora_A.weight"
    tensors[name] = torch.empty(0)
    kind, message = refusal(write_adapter(tmp_path, tensors=tensors))
    assert kind == "adapter_invalid"
    assert name in message
    assert "ZeRO-3 without gathering" in message


@pytest.mark.parametrize("dtype", [torch.int8, torch.float64, torch.int32])
def test_an_unserved_dtype_is_named(dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = {name: tensor.to(dtype) for name, tensor in lora_tensors().items()}
    kind, message = refusal(write_adapter(tmp_path, tensors=tensors))
    assert (kind, "dtype" in message) == ("adapter_unsupported", True)


def test_a_tensor_of_three_dimensions_is_invalid(tmp_path: Path) -> None:
    tensors = {name: tensor[None] for name, tensor in lora_tensors().items()}
    assert refusal(write_adapter(tmp_path, tensors=tensors))[0] == "adapter_invalid"


# What is only noted


@pytest.mark.parametrize("name", [None, "/home/me/models/base", "https://hub/acme/other", "acme/private-4bit"])
def test_the_name_of_the_base_gives_one_warning_and_is_never_opened(name: str | None, tmp_path: Path) -> None:
    config = config_fields(base_model_name_or_path=name)
    manifest = check(write_adapter(tmp_path, config), base_model_name="acme/tiny")
    assert len(manifest.warnings) == 1


@pytest.mark.parametrize("served", ["acme/tiny", "other/Tiny", "/models/tiny/", None])
def test_the_same_last_part_of_the_base_name_is_no_warning(served: str | None, tmp_path: Path) -> None:
    assert check(write_adapter(tmp_path), base_model_name=served).warnings == []


def test_unknown_fields_are_noted_once(tmp_path: Path) -> None:
    manifest = check(write_adapter(tmp_path, config_fields(new_field=1, other_field=None)))
    assert [warning for warning in manifest.warnings if "'new_field', 'other_field'" in warning]
    assert len(manifest.warnings) == 1


def test_tensors_beside_target_modules_are_noted(tmp_path: Path) -> None:
    manifest = check(write_adapter(tmp_path, config_fields(target_modules=["q_proj", "k_proj"])))
    assert any("target_modules" in warning and "down_proj" in warning for warning in manifest.warnings)


@pytest.mark.parametrize("value", ["all-linear", ".*", None, []])
def test_target_modules_of_any_form_leave_the_decision_to_the_tensors(value: Any, tmp_path: Path) -> None:
    assert len(check(write_adapter(tmp_path, config_fields(target_modules=value))).modules) == 4


def test_what_trainers_leave_beside_the_adapter_is_not_opened(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path)
    for name in ("training_args.bin", "tokenizer.json", "added_tokens.json", "adapter_model.bin"):
        (folder / name).write_bytes(b"\x80\x04broken")
    [warning] = check(folder).warnings
    assert warning.startswith("added_tokens.json, tokenizer.json are not used")


# Files that are missing or of another kind


def test_a_missing_config_says_what_the_folder_is(tmp_path: Path) -> None:
    assert CONFIG_FILE in refusal(tmp_path)[1]
    write_adapter(tmp_path / "checkpoint-5")
    kind, message = refusal(tmp_path)
    assert (kind, "sub-folder 'checkpoint-5'" in message) == ("adapter_invalid", True)
    (tmp_path / "config.json").write_text("{}")
    assert "full model" in refusal(tmp_path)[1]


def test_a_folder_that_is_not_there_is_invalid(tmp_path: Path) -> None:
    assert refusal(tmp_path / "nowhere")[0] == "adapter_invalid"


@pytest.mark.parametrize(
    ("name", "kind", "word"),
    [
        ("adapter_model.bin", "adapter_unsupported", "pickle"), ("adapter_model.pt", "adapter_unsupported", "pickle"),
        ("adapters.safetensors", "adapter_unsupported", "MLX"), ("lora.gguf", "adapter_unsupported", "llama.cpp"),
        ("lora.nemo", "adapter_unsupported", "NeMo"), ("README.md", "adapter_invalid", WEIGHTS_FILE),
    ],
)  # fmt: skip
def test_other_weights_are_told_by_their_format(name: str, kind: str, word: str, tmp_path: Path) -> None:
    (tmp_path / CONFIG_FILE).write_text(json.dumps(config_fields()))
    (tmp_path / name).write_bytes(b"x")
    found, message = refusal(tmp_path)
    assert (found, word in message) == (kind, True)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'"x"', b"\xff\xfe", b"[" * 100_000, b" " * (2**20 + 1)])
def test_a_broken_config_is_invalid(content: bytes, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path)
    (folder / CONFIG_FILE).write_bytes(content)
    kind, message = refusal(folder)
    assert (kind, CONFIG_FILE in message) == ("adapter_invalid", True)


@pytest.mark.parametrize("name", [CONFIG_FILE, WEIGHTS_FILE])
def test_a_folder_or_a_pipe_in_place_of_a_file_is_invalid(name: str, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path)
    (folder / name).unlink()
    os.mkfifo(folder / name)
    assert refusal(folder) == ("adapter_invalid", f"{name} is not a file")
    (folder / name).unlink()
    (folder / name).mkdir()
    assert refusal(folder) == ("adapter_invalid", f"{name} is not a file")
