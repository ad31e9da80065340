"""Whole models through Triton's interpreter: every family's logits equal those of the CPU's kernels."""

import copy
import threading
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from expert_adapters import BOTH, write_adapter
from paged_model import PagedModel
from ranks import run_ranks
from slow_dequantization import FIXTURES
from tiny_families import FAMILIES, make_family_adapter, make_tiny
from tiny_models import make_peft_adapter, make_tiny_llama
from triton.runtime.interpreter import GridExecutor
from triton_interpreter import DEVICE, IS_INTERPRETED, needs_interpreter

from loraplex_kernels import dispatch
from loraplex_models.adapters.cut import cut_adapter
from loraplex_models.adapters.manifest import check_adapter
from loraplex_models.adapters.paged_slots import PagedAdapterSlots, make_slots
from loraplex_models.adapters.slots import AdapterSlots
from loraplex_models.adapters.weights import load_adapter_weights
from loraplex_models.config import read_config
from loraplex_models.cuts import RankPart
from loraplex_models.loader import load_model
from loraplex_models.parallel import ParallelGroup
from loraplex_quant.gpu_experts import PackedExperts
from loraplex_quant.gpu_groups import GroupedOnGpu

PROMPTS = {"base": list(range(5, 10)), "first": list(range(30, 41)), "second": [7, 9, 11]}
SLOTS = {"base": -1, "first": 0, "second": 1}


def run(model, slots: AdapterSlots) -> dict[str, torch.Tensor]:
    """Prompts in chunks beside decodes, with base rows between two adapters."""
    paged = PagedModel(model, slots=slots)
    for name, tokens in PROMPTS.items():
        paged.add(name, tokens, SLOTS[name])
    paged.step({"base": 3, "first": 8})
    paged.step({"base": 1, "first": 3, "second": 1})
    paged.step({"base": 1, "second": 2})
    return {name: paged.logits(name) for name in PROMPTS}


def both_ways(
    folder: Path, adapters: list[Path], monkeypatch: pytest.MonkeyPatch, quantize: str | None = None
) -> list[dict[str, torch.Tensor]]:
    """What the CPU's kernels give, and what Triton's give."""
    found = []
    for by_triton, device in ((False, torch.device("cpu")), (True, DEVICE)):
        monkeypatch.setattr(dispatch, "INTERPRETS", by_triton and IS_INTERPRETED)
        model = load_model(folder, dtype=torch.float32, device=device, group=ParallelGroup.single(), quantize=quantize)
        if quantize is not None and by_triton:
            assert all(isinstance(linear._weights, PackedExperts) for linear in model.expert_linears)
        slots = make_slots(model, 2, 64)
        for slot, adapter in enumerate(adapters):
            manifest = check_adapter(adapter, model.config, max_rank=64)
            slots.set(slot, load_adapter_weights(adapter, manifest, dtype=torch.float32))
        found.append({name: logits.cpu() for name, logits in run(model, slots).items()})
    return found


# Those whose layers differ from each other have two.
NUM_LAYERS = {
    "Llama": 2, "Qwen3-MoE, one layer dense": 2, "Gemma 2": 1, "Gemma 3, text": 2, "Granite": 1, "Command-R": 1,
    "OLMo 2": 2, "Phi-2": 1, "GPT-2": 1, "Starcoder2": 1,
}  # fmt: skip


@pytest.mark.parametrize("name", NUM_LAYERS)
def test_a_family_gives_the_same_logits_by_triton_and_by_the_cpu(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family = FAMILIES[name]
    count = NUM_LAYERS[name]
    other_fields = {"n_layer": count, "layer_types": ["sliding_attention", "full_attention"]}
    needed = {field: value for field, value in other_fields.items() if field in family.fields}
    reference = make_tiny(family, tmp_path / "model", num_hidden_layers=count, **needed)
    some = replace(family, linears=family.linears[:1])
    adapters = [
        make_family_adapter(tmp_path / "first", reference, family, rank=5),
        make_family_adapter(tmp_path / "second", reference, some, rank=17),
    ]
    found = both_ways(tmp_path / "model", adapters, monkeypatch)
    for prompt in PROMPTS:
        assert (found[0][prompt] - found[1][prompt]).abs().max() < 1e-3, prompt
    assert (found[0]["first"] - found[0]["base"][:1]).abs().max() > 0.1


@needs_interpreter
@pytest.mark.parametrize("name", ["OLMo 2", "Mixtral"])
def test_two_ranks_give_the_logits_of_one_by_triton(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """OLMo 2 is the one family whose ranks also exchange sums of squares; Mixtral's experts are cut."""
    family = FAMILIES[name]
    reference = make_tiny(family, tmp_path / "model", num_hidden_layers=1)
    adapters = [make_family_adapter(tmp_path / f"r{rank}", reference, family, rank) for rank in (5, 17)]
    if name == "Mixtral":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of peft about its support of stacked parameters
            adapters[1] = write_adapter(
                tmp_path / "experts", reference, target_modules=["k_proj"], target_parameters=BOTH, r=11
            )
    config = read_config(tmp_path / "model")
    one_at_a_time(monkeypatch)

    def logits(group: ParallelGroup) -> dict[str, torch.Tensor]:
        model = load_model(tmp_path / "model", dtype=torch.float32, device=torch.device("cpu"), group=group)
        assert not (model.can_be_captured and group.size > 1), "gloo's sums cannot be captured"
        slots = make_slots(model, 2, 64)
        for slot, adapter in enumerate(adapters):
            manifest = check_adapter(adapter, config, max_rank=64)
            weights = load_adapter_weights(adapter, manifest, dtype=torch.float32)
            slots.set(slot, cut_adapter(weights, RankPart(config, group.rank, group.size)))
        return run(model, slots)

    alone = logits(ParallelGroup.single())
    monkeypatch.setattr(dispatch, "INTERPRETS", True)
    for found in run_ranks(2, tmp_path, logits):
        for prompt in PROMPTS:
            assert (found[prompt] - alone[prompt]).abs().max() < 1e-3, prompt
    assert (alone["first"] - alone["base"][:1]).abs().max() > 0.1


def one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the ranks' threads take turns: the interpreter holds one kernel's place in its grid."""
    run_kernel, turn = GridExecutor.__call__, threading.Lock()

    def run_alone(*arguments: Any, **settings: Any) -> Any:
        with turn:
            return run_kernel(*arguments, **settings)

    monkeypatch.setattr(GridExecutor, "__call__", run_alone)


def test_quantised_experts_stay_packed_and_give_the_same_logits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family = FAMILIES["Mixtral"]
    reference = make_tiny(family, tmp_path / "model", num_hidden_layers=1, intermediate_size=64)
    adapter = make_family_adapter(tmp_path / "a", reference, family, rank=5)
    found = both_ways(tmp_path / "model", [adapter], monkeypatch, quantize="int4")
    for prompt in PROMPTS:
        assert (found[0][prompt] - found[1][prompt]).abs().max() < 1e-3, prompt


def test_adapters_on_experts_give_the_same_logits_by_triton(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One adapter changes all linears of experts and one of attention, the other the down linears alone."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of peft about its support of stacked parameters
        reference = make_tiny(FAMILIES["Qwen3-MoE"], tmp_path / "model", num_hidden_layers=1)
        adapters = [
            write_adapter(tmp_path / "first", reference, target_modules=["q_proj"], target_parameters=BOTH, r=5),
            write_adapter(tmp_path / "second", reference, target_modules=[], target_parameters=BOTH[1:], r=11),
        ]
    found = both_ways(tmp_path / "model", adapters, monkeypatch)
    monkeypatch.setattr(dispatch, "INTERPRETS", False)
    model = load_model(
        tmp_path / "model", dtype=torch.float32, device=torch.device("cpu"), group=ParallelGroup.single()
    )
    base = run(model, AdapterSlots(model, 2))
    for prompt in PROMPTS:
        assert (found[0][prompt] - found[1][prompt]).abs().max() < 1e-3, prompt
        assert prompt == "base" or (found[0][prompt] - base[prompt]).abs().max() > 0.05, prompt


FEATURES: dict[str, dict[str, Any]] = {
    "DoRA, all parts": {"use_dora": True, "target_modules": ["q_proj", "o_proj", "down_proj"]},
    "biases": {"bias": "all", "lora_bias": True},
    "copies": {"modules_to_save": ["lm_head", "embed_tokens"]},
    "both ends": {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    "rows": {"trainable_token_indices": [5, 9]},
}


@needs_interpreter
def test_what_adapters_bring_beside_products_is_the_same_by_triton(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = make_tiny_llama(tmp_path / "model", attention_bias=True)
    model = load_model(
        tmp_path / "model", dtype=torch.float32, device=torch.device("cpu"), group=ParallelGroup.single()
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft saves embeddings too, and says so
        folders = [
            make_peft_adapter(tmp_path / name, copy.deepcopy(reference), seed=seed, **fields)
            for seed, (name, fields) in enumerate(FEATURES.items())
        ]
    found = []
    for interprets, make in ((False, AdapterSlots), (True, lambda model, count: PagedAdapterSlots(model, count, 64))):
        monkeypatch.setattr(dispatch, "INTERPRETS", interprets)
        slots = make(model, len(folders))
        paged = PagedModel(model, slots=slots)
        paged.add("base", [5, 9, 30])
        for slot, folder in enumerate(folders):
            manifest = check_adapter(folder, model.config, max_rank=64)
            slots.set(slot, load_adapter_weights(folder, manifest, dtype=torch.float32))
            paged.add(str(slot), [5, 9, 30], slot)
        names = ["base", *map(str, range(len(folders)))]
        paged.step(dict.fromkeys(names, 2))
        paged.step(dict.fromkeys(names, 1))
        found.append({name: paged.logits(name) for name in names})
    for name, one in found[0].items():
        assert (one - found[1][name]).abs().max() < 1e-3, name
        assert name == "base" or (one - found[0]["base"]).abs().max() > 0.1


@needs_interpreter
@pytest.mark.parametrize(
    "name",
    [
        "autogptq-b2-g32-noact-asym",
        "autogptq-b3-g32-act-asym",
        "autogptq-b4-g32-act-asym",
        "gptqmodel-g8-32-sym",
        "autoawq-gemm-g32",
        "ct-gptq-w4a16-act",
    ],
)
def test_checkpoints_of_other_programs_stay_packed_and_give_the_same_logits(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for interprets in (False, True):
        monkeypatch.setattr(dispatch, "INTERPRETS", interprets)
        model = load_model(
            FIXTURES / name, dtype=torch.float32, device=torch.device("cpu"), group=ParallelGroup.single()
        )
        assert isinstance(model.layers[0].qkv._method, GroupedOnGpu) is interprets
        paged = PagedModel(model)
        paged.add("a", list(range(3, 12)))
        found.append(paged.run_alone("a", 9))
    assert (found[0] - found[1]).abs().max() < 1e-3


def test_what_adapters_bring_beside_products_is_applied_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reference = make_tiny(FAMILIES["Llama"], tmp_path / "model", num_hidden_layers=1)
    first = make_peft_adapter(tmp_path / "first", reference, rank=4, use_dora=True, modules_to_save=["lm_head"])
    second = make_peft_adapter(tmp_path / "second", reference, rank=9, seed=2)
    found = both_ways(tmp_path / "model", [first, second], monkeypatch)
    for prompt in PROMPTS:
        assert (found[0][prompt] - found[1][prompt]).abs().max() < 1e-3, prompt
