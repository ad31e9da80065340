"""A model over several ranks, in threads, against the same model on one."""

import copy
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from paged_model import PagedModel, true_logits
from ranks import run_ranks
from slow_dequantization import FIXTURES
from tiny_families import FAMILIES, make_family_adapter, make_tiny
from tiny_models import load_peft, make_peft_adapter, make_tiny_llama
from torch import Tensor

from loraplex_models.adapters.cut import cut_adapter
from loraplex_models.adapters.finish import check_against_base
from loraplex_models.adapters.manifest import check_adapter
from loraplex_models.adapters.paged_slots import PagedAdapterSlots
from loraplex_models.adapters.row_sums import UnfinishedWeights, take_shares
from loraplex_models.adapters.slots import AdapterSlots
from loraplex_models.adapters.weights import load_adapter_weights
from loraplex_models.config import read_config
from loraplex_models.cuts import RankPart
from loraplex_models.decoder import CausalLM
from loraplex_models.loader import load_model
from loraplex_models.parallel import ParallelGroup

TOKENS = list(range(3, 60))


def logits(
    folder: Path,
    adapters: list[Path],
    group: ParallelGroup,
    make: Callable[[CausalLM, int], AdapterSlots] = AdapterSlots,
    quantize: str | None = None,
) -> list[Tensor]:
    """The logits of a prompt with each adapter, and without, in one batch."""
    model = load_model(folder, dtype=torch.float32, device=torch.device("cpu"), group=group, quantize=quantize)
    config = read_config(folder)
    slots = make(model, len(adapters) or 1)
    for slot, adapter in enumerate(adapters):
        manifest = check_adapter(adapter, config, max_rank=64)
        weights = load_adapter_weights(adapter, manifest, dtype=torch.float32)
        part = RankPart(config, group.rank, group.size)
        ready = take_shares(check_against_base(cut_adapter(weights, part), model), model, part)
        slots.set(slot, ready.finished(group) if isinstance(ready, UnfinishedWeights) else ready)
    # Captured and plain steps must not meet in one exchange, so ranks must agree on which adapters need plain ones.
    extras = group.gather_numbers([int(slots.need_plain_steps({slot})) for slot in range(len(adapters))])
    assert all(of_rank == extras[0] for of_rank in extras)
    paged = PagedModel(model, slots=slots)
    names = [str(slot) for slot in range(-1, len(adapters))]
    for name in names:
        paged.add(name, TOKENS, int(name))
    for count in (30, 20, 1, 6):
        paged.step(dict.fromkeys(names, count))
    return [paged.logits(name) for name in names]


def make_paged(model: CausalLM, num_slots: int) -> AdapterSlots:
    return PagedAdapterSlots(model, num_slots, 64)


CASES = [("Llama", 3), ("Llama", 4), ("OLMo 2", 4), *((name, 2) for name in FAMILIES)]


@pytest.mark.parametrize(("name", "size"), CASES)
def test_ranks_together_give_the_logits_of_one(name: str, size: int, tmp_path: Path) -> None:
    family = FAMILIES[name]
    truth = make_tiny(family, tmp_path / "model")
    adapters = [make_family_adapter(tmp_path / f"r{rank}", truth, family, rank) for rank in (4, 12, 64)]
    alone = logits(tmp_path / "model", adapters, ParallelGroup.single())
    for of_rank in run_ranks(size, tmp_path, lambda group: logits(tmp_path / "model", adapters, group)):
        for one, other in zip(alone, of_rank, strict=True):
            torch.testing.assert_close(other, one, rtol=0, atol=1e-3)


FEATURES: dict[str, dict[str, Any]] = {
    "DoRA": {"use_dora": True},
    "DoRA by inputs alone": {"use_dora": True, "target_modules": ["o_proj", "down_proj"], "bias": "lora_only"},
    "DoRA at both ends": {"use_dora": True, "target_modules": ["v_proj", "embed_tokens", "lm_head"]},
    "biases": {"bias": "all", "lora_bias": True},
    "copies": {"modules_to_save": ["lm_head", "embed_tokens"]},
    "both ends": {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    "rows": {"trainable_token_indices": {"embed_tokens": [5, 9], "lm_head": [300, 7]}},
}


@pytest.mark.parametrize(("size", "make"), [(2, AdapterSlots), (4, AdapterSlots), (2, make_paged)])
def test_what_adapters_bring_beside_products_is_the_same_on_several_ranks(
    size: int, make: Callable[[CausalLM, int], AdapterSlots], tmp_path: Path
) -> None:
    truth = make_tiny_llama(tmp_path / "model", attention_bias=True, mlp_bias=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft saves embeddings too, and says so
        adapters = [
            make_peft_adapter(tmp_path / name, copy.deepcopy(truth), seed=seed, **fields)
            for seed, (name, fields) in enumerate(FEATURES.items())
        ]
    alone = logits(tmp_path / "model", adapters, ParallelGroup.single())
    for of_rank in run_ranks(size, tmp_path, lambda group: logits(tmp_path / "model", adapters, group, make)):
        for name, one, other in zip(["base", *FEATURES], alone, of_rank, strict=True):
            assert (one - other).abs().max() < 1e-3, name


def test_dora_keeps_the_bias_of_a_head_that_is_cut(tmp_path: Path) -> None:
    truth = make_tiny(FAMILIES["Phi-2"], tmp_path / "model")
    assert truth.lm_head.bias is not None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft saves the base's head too, and says so
        adapter = make_peft_adapter(
            tmp_path / "a", copy.deepcopy(truth), use_dora=True, target_modules=["dense", "fc2", "lm_head"]
        )
    _, alone = logits(tmp_path / "model", [adapter], ParallelGroup.single())
    for _, found in run_ranks(2, tmp_path, lambda group: logits(tmp_path / "model", [adapter], group)):
        assert (found - alone).abs().max() < 1e-3


def test_dora_takes_its_lengths_from_parts_as_each_rank_has_quantised_them(tmp_path: Path) -> None:
    truth = make_tiny_llama(tmp_path / "model")
    config, quantize = read_config(tmp_path / "model"), "bitsandbytes-nf4"
    adapter = make_peft_adapter(tmp_path / "a", truth, use_dora=True)

    def work(group: ParallelGroup) -> tuple[dict[str, Tensor], list[Tensor]]:
        model = load_model(
            tmp_path / "model", dtype=torch.float32, device=torch.device("cpu"), group=group, quantize=quantize
        )
        served = {site.module: model.base_weight(site.module) for site in model.lora_sites}
        return served, logits(tmp_path / "model", [adapter], group, quantize=quantize)

    first, second = run_ranks(2, tmp_path, work)
    for module, weight in first[0].items():
        cut = RankPart(config, 0, 2).linear(module)
        assert cut is not None
        stored = truth.get_submodule(f"model.{module}").weight
        with torch.no_grad():
            stored.copy_(torch.cat([weight, second[0][module]], dim=0 if cut.inputs is None else 1))
    expected = true_logits(load_peft(adapter, truth), TOKENS)
    for _, (_, found) in (first, second):
        assert (found - expected).abs().max() < 1e-3


SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim")
QUANTIZED = (
    "autogptq-b4-g32-act-asym",
    "autogptq-b4-gall-noact-asym",
    "autogptq-b3-g32-act-asym",
    "autoawq-gemv-g32",
    "ct-gptq-w4a16-act",
    "bnb-nf4-double",
)


@pytest.mark.parametrize("name", QUANTIZED)
def test_quantised_weights_are_cut_as_if_they_were_plain(name: str, tmp_path: Path) -> None:
    raw = json.loads((FIXTURES / name / "config.json").read_text())
    truth = make_tiny_llama(tmp_path / "plain", **{key: raw[key] for key in SIZES if raw.get(key)})
    adapter = make_peft_adapter(tmp_path / "r12", truth, rank=12)
    alone = logits(FIXTURES / name, [adapter], ParallelGroup.single())
    assert (alone[0] - alone[1]).abs().max() > 0.1
    for of_rank in run_ranks(2, tmp_path, lambda group: logits(FIXTURES / name, [adapter], group)):
        for one, other in zip(alone, of_rank, strict=True):
            assert (one - other).abs().max() < 1e-3
