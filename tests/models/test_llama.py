"""Our logits against transformers', on tiny random checkpoints."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from paged_model import PagedModel, random_tokens, true_logits
from tiny_models import make_tiny_llama
from transformers import LlamaForCausalLM, MistralConfig, MistralForCausalLM

from loraplex_models.decoder import CausalLM
from loraplex_models.loader import load_model
from loraplex_models.parallel import ParallelGroup

ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}
SHAPES: dict[str, dict[str, Any]] = {
    "gqa": {},
    "mha": {"num_key_value_heads": 4},
    "one key head": {"num_key_value_heads": 1},
    "tied": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "wide heads": {"head_dim": 32},
}


def load(folder: Path, dtype: torch.dtype = torch.float32) -> CausalLM:
    return load_model(folder, dtype=dtype, device=torch.device("cpu"), group=ParallelGroup.single())


def assert_close(ours: torch.Tensor, truth: torch.Tensor, tolerance: float = 1e-4) -> None:
    assert (ours.float() - truth.float()).abs().max() < tolerance


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_equal_those_of_transformers_for_each_shape(shape: str, tmp_path: Path) -> None:
    truth = make_tiny_llama(tmp_path, **SHAPES[shape])
    tokens = random_tokens(37)
    paged = PagedModel(load(tmp_path))
    paged.add("a", tokens)
    assert_close(paged.run_alone("a", 37), true_logits(truth, tokens))


@pytest.mark.parametrize("kind", ROPES)
def test_logits_equal_those_of_transformers_for_each_rope(kind: str, tmp_path: Path) -> None:
    truth = make_tiny_llama(tmp_path, rope_parameters=ROPES[kind])
    tokens = random_tokens(150)
    paged = PagedModel(load(tmp_path))
    paged.add("a", tokens)
    assert_close(paged.run_alone("a", 60), true_logits(truth, tokens))


def test_dynamic_rope_beyond_the_trained_positions_equals_transformers_token_by_token(tmp_path: Path) -> None:
    truth = make_tiny_llama(tmp_path, rope_parameters=ROPES["dynamic"], max_position_embeddings=16)
    tokens = random_tokens(40)
    paged = PagedModel(load(tmp_path))
    paged.add("a", tokens)
    cache = None
    rows = []
    with torch.inference_mode():
        for token in tokens:
            out = truth(torch.tensor([[token]]), past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            rows.append(out.logits[0])
    assert_close(paged.run_alone("a", 1), torch.cat(rows))


@pytest.mark.parametrize("chunk", [1, 3, 8, 16])
def test_chunked_prefill_equals_whole_prefill(chunk: int, tmp_path: Path) -> None:
    truth = make_tiny_llama(tmp_path)
    tokens = random_tokens(41)
    paged = PagedModel(load(tmp_path))
    paged.add("a", tokens)
    assert_close(paged.run_alone("a", chunk), true_logits(truth, tokens))


@pytest.mark.parametrize("seed", range(6))
def test_random_mixes_of_decodes_and_chunks_equal_each_sequence_alone(seed: int, tmp_path: Path) -> None:
    truth = make_tiny_llama(tmp_path)
    paged = PagedModel(load(tmp_path), num_blocks=512)
    draw = random.Random(seed)
    tokens = {f"s{i}": random_tokens(draw.choice((1, 5, 16, 33, 120)), seed=100 * seed + i) for i in range(7)}
    for name in tokens:
        paged.add(name, tokens[name])
    while waiting := [name for name in tokens if paged.remaining(name)]:
        chosen = draw.sample(waiting, draw.randint(1, len(waiting)))
        paged.step({name: min(draw.choice((1, 1, 2, 7, 40)), paged.remaining(name)) for name in chosen})
    for name in tokens:
        assert_close(paged.logits(name), true_logits(truth, tokens[name]))


def test_sequences_of_very_different_lengths_are_computed_in_groups_and_equal_each_alone(tmp_path: Path) -> None:
    truth = make_tiny_llama(tmp_path, max_position_embeddings=2048)
    paged = PagedModel(load(tmp_path), num_blocks=1024, block_size=16)
    lengths = {"long": 1400, "short": 3, "middle": 200, "other": 9}
    tokens = {name: random_tokens(length, seed=length) for name, length in lengths.items()}
    for name in tokens:
        paged.add(name, tokens[name])
    paged.step({name: lengths[name] - 2 for name in tokens})
    paged.step(dict.fromkeys(tokens, 1))
    paged.step(dict.fromkeys(tokens, 1))
    for name in tokens:
        assert_close(paged.logits(name), true_logits(truth, tokens[name]))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.25), (torch.float16, 0.04)])
def test_half_precision_stays_near_float32(dtype: torch.dtype, tolerance: float, tmp_path: Path) -> None:
    truth = make_tiny_llama(tmp_path)
    tokens = random_tokens(50)
    paged = PagedModel(load(tmp_path, dtype))
    paged.add("a", tokens)
    ours = paged.run_alone("a", 20)
    assert ours.dtype == torch.float32
    assert_close(ours, true_logits(truth, tokens), tolerance)


def test_a_window_hides_the_keys_that_transformers_hides(tmp_path: Path) -> None:
    plain = make_tiny_llama(tmp_path / "llama")
    config = MistralConfig(**(plain.config.to_dict() | {"sliding_window": 11, "architectures": None}))
    config._attn_implementation = "eager"
    truth = MistralForCausalLM(config).eval()
    truth.load_state_dict(plain.state_dict())
    truth.save_pretrained(tmp_path / "mistral")
    tokens = random_tokens(60)
    for chunk in (60, 7, 1):
        paged = PagedModel(load(tmp_path / "mistral"))
        paged.add("a", tokens)
        assert_close(paged.run_alone("a", chunk), true_logits(truth, tokens))


def test_a_value_that_is_not_finite_stays_in_its_own_sequence(tmp_path: Path) -> None:
    make_tiny_llama(tmp_path)
    model = load(tmp_path)
    paged = PagedModel(model)
    for name, length in (("a", 30), ("b", 9)):
        paged.add(name, random_tokens(length, seed=length))
        paged.step({name: length - 1})
    fresh = PagedModel(model)
    for cache in paged.cache.layers:
        written = set(paged._blocks["b"])
        for block in range(paged.cache.num_blocks):
            if block not in written:
                cache[block * 4 : (block + 1) * 4] = float("nan")
    paged.step({"a": 1, "b": 1})
    fresh.add("b", random_tokens(9, seed=9))
    assert_close(paged.logits("b"), fresh.run_alone("b", 9))


def test_no_sampled_row_gives_no_logits(tmp_path: Path) -> None:
    make_tiny_llama(tmp_path)
    model = load(tmp_path)
    assert model._head.forward(torch.empty(0, 64)).shape == (0, 512)


def test_bytes_are_counted_for_weights_and_blocks(tmp_path: Path) -> None:
    truth: LlamaForCausalLM = make_tiny_llama(tmp_path)
    model = load(tmp_path)
    assert model.num_bytes == sum(p.nbytes for p in truth.parameters())
    cache = model.new_kv_cache(10, 16)
    assert cache.num_bytes == 10 * model.kv_bytes_per_block(16)
    assert [site.module for site in model.lora_sites[:7]] == [
        "layers.0.self_attn.q_proj",
        "layers.0.self_attn.k_proj",
        "layers.0.self_attn.v_proj",
        "layers.0.self_attn.o_proj",
        "layers.0.mlp.gate_proj",
        "layers.0.mlp.up_proj",
        "layers.0.mlp.down_proj",
    ]
