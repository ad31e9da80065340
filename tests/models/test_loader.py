"""What the loader reads, and what it refuses with which words."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from paged_model import PagedModel
from safetensors.torch import load_file, save_file
from tiny_models import make_tiny_llama

from loraplex_models import checkpoint
from loraplex_models.checkpoint import Checkpoint, CheckpointError
from loraplex_models.decoder import CausalLM
from loraplex_models.loader import load_model
from loraplex_models.parallel import ParallelGroup


def load(folder: Path, **options: Any) -> CausalLM:
    settings: dict[str, Any] = {"dtype": torch.float32, "device": torch.device("cpu"), "group": ParallelGroup.single()}
    return load_model(folder, **(settings | options))


def logits(model: CausalLM) -> torch.Tensor:
    paged = PagedModel(model)
    paged.add("a", list(range(10, 30)))
    return paged.run_alone("a", 20)


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(config | changes), encoding="utf-8")


def edit_weights(folder: Path, edit: Any) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_a_sharded_checkpoint_gives_the_same_model_as_a_single_file(tmp_path: Path) -> None:
    make_tiny_llama(tmp_path / "one")
    make_tiny_llama(tmp_path / "many", shard_bytes=60_000)
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 1
    assert torch.equal(logits(load(tmp_path / "one")), logits(load(tmp_path / "many")))


def test_progress_rises_to_the_size_of_the_checkpoint(tmp_path: Path) -> None:
    make_tiny_llama(tmp_path, shard_bytes=60_000)
    seen: list[tuple[int, int]] = []
    load(tmp_path, progress=lambda done, total: seen.append((done, total)))
    done = [step for step, _ in seen]
    total = sum(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
    assert done == sorted(done) and len(done) > 4
    assert seen[-1] == (total, total)


def test_the_files_may_go_once_the_model_is_loaded(tmp_path: Path) -> None:
    make_tiny_llama(tmp_path, tie_word_embeddings=True)
    for dtype in (torch.float32, torch.float16):
        model = load(tmp_path, dtype=dtype)
        before = logits(model)
        size = (tmp_path / "model.safetensors").stat().st_size
        content = (tmp_path / "model.safetensors").read_bytes()
        with (tmp_path / "model.safetensors").open("r+b") as file:
            file.write(bytes(size))
        assert torch.equal(logits(model), before)
        (tmp_path / "model.safetensors").write_bytes(content)


def test_a_tied_model_may_store_its_head_too(tmp_path: Path) -> None:
    make_tiny_llama(tmp_path, tie_word_embeddings=True)
    before = logits(load(tmp_path))
    edit_weights(tmp_path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    assert torch.equal(logits(load(tmp_path)), before)


def test_old_rotary_buffers_are_passed_over(tmp_path: Path) -> None:
    make_tiny_llama(tmp_path)
    edit_weights(tmp_path, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}))
    load(tmp_path)


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    make_tiny_llama(tmp_path)
    edit_weights(tmp_path, lambda t: t.pop("model.layers.1.mlp.down_proj.weight"))
    with pytest.raises(CheckpointError, match=r"no tensor 'model\.layers\.1\.mlp\.down_proj\.weight'"):
        load(tmp_path)


def test_a_tensor_left_over_is_named(tmp_path: Path) -> None:
    make_tiny_llama(tmp_path)
    edit_weights(tmp_path, lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(64)}))
    with pytest.raises(CheckpointError, match=r"1 tensors that LlamaForCausalLM does not know: .*q_proj\.bias"):
        load(tmp_path)


def test_a_wrong_shape_is_named_with_both_shapes(tmp_path: Path) -> None:
    make_tiny_llama(tmp_path)
    edit_weights(tmp_path, lambda t: t.update({"model.norm.weight": torch.zeros(63)}))
    with pytest.raises(CheckpointError, match=r"'model\.norm\.weight' has shape \[63\], config\.json asks for \[64\]"):
        load(tmp_path)


def test_a_tensor_of_integers_is_refused(tmp_path: Path) -> None:
    make_tiny_llama(tmp_path)
    edit_weights(tmp_path, lambda t: t.update({"model.norm.weight": torch.zeros(64, dtype=torch.int8)}))
    with pytest.raises(CheckpointError, match=r"'model\.norm\.weight' is of torch\.int8"):
        load(tmp_path)


@pytest.mark.parametrize("kept", [0, 4, 500, 100_000])
def test_a_truncated_shard_is_named(kept: int, tmp_path: Path) -> None:
    make_tiny_llama(tmp_path)
    content = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(content[:kept])
    with pytest.raises(CheckpointError, match=r"model\.safetensors' is broken or incomplete"):
        load(tmp_path)


def test_a_shard_that_the_index_names_and_is_not_there_is_named(tmp_path: Path) -> None:
    make_tiny_llama(tmp_path, shard_bytes=60_000)
    gone = sorted(tmp_path.glob("*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(CheckpointError, match=rf"{gone.name}' does not exist"):
        load(tmp_path)


def test_a_shard_that_this_user_may_not_read_is_not_called_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, framework: str) -> None:
        raise FileNotFoundError(f"No such file or directory: {path}")  # safetensors' answer to EACCES

    make_tiny_llama(tmp_path)
    monkeypatch.setattr(checkpoint, "safe_open", refuse)
    with pytest.raises(CheckpointError, match=rf"model\.safetensors' may not be read by user {os.getuid()}"):
        load(tmp_path)


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/model.safetensors", 3])
def test_an_index_may_not_name_a_shard_outside_its_folder(name: Any, tmp_path: Path) -> None:
    make_tiny_llama(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": name}}), encoding="utf-8")
    with pytest.raises(CheckpointError, match="outside its folder"):
        load(tmp_path)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"weight_map": 3}'])
def test_a_broken_index_is_named(content: str, tmp_path: Path) -> None:
    make_tiny_llama(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(content, encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"index\.json' cannot be read"):
        load(tmp_path)


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(2)}, tmp_path / "a.safetensors")
    save_file({"x": torch.zeros(2)}, tmp_path / "b.safetensors")
    index = {"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"'x' is both in 'a\.safetensors' and 'b\.safetensors'"):
        Checkpoint(tmp_path)


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    make_tiny_llama(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="only safetensors are served"):
        load(tmp_path)


REFUSED_CONFIGS: list[tuple[dict[str, Any], str]] = [
    ({"architectures": ["GPTJForCausalLM"]}, "'GPTJForCausalLM' is not served; served are LlamaForCausalLM, Mistral"),
    ({"quantization_config": {"quant_method": "exl2"}}, "format 'exl2' are not served; served are gptq, awq"),
    ({"hidden_act": "relu"}, "activation 'relu' is not served; served are silu"),
    ({"rope_parameters": {"rope_type": "ntk"}}, "rope scaling 'ntk' is not served"),
    ({"rope_parameters": {"rope_type": "linear"}}, "'linear' needs a number 'factor'"),
    ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
    ({"hidden_size": None}, "no 'hidden_size'"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED_CONFIGS)
def test_a_config_that_is_not_served_is_refused_with_the_reason(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    make_tiny_llama(tmp_path)
    edit_config(tmp_path, **changes)
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path)


def test_a_folder_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        load(tmp_path / "nowhere")


def test_a_rope_scaling_that_is_asked_for_is_that_of_a_config_with_it(tmp_path: Path) -> None:
    make_tiny_llama(tmp_path / "plain")
    parameters = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 3.0}
    make_tiny_llama(tmp_path / "scaled", rope_parameters=parameters)
    asked = load(tmp_path / "plain", rope_scaling="linear", rope_factor=3.0)
    assert torch.equal(logits(asked), logits(load(tmp_path / "scaled")))
    assert not torch.equal(logits(asked), logits(load(tmp_path / "plain")))


REFUSED_OPTIONS: list[tuple[dict[str, Any], str]] = [
    ({"rope_scaling": "yarn", "rope_factor": 2.0}, "'yarn' cannot be asked for; can be: linear, dynamic"),
    ({"rope_factor": 2.0}, "without a rope scaling"),
    ({"rope_scaling": "linear", "rope_factor": 0.5}, "below 1"),
    ({"dtype": torch.float64}, "float64 is not served"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED_OPTIONS)
def test_an_option_that_is_not_served_is_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    make_tiny_llama(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path, **options)
