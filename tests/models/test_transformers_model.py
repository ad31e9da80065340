"""Families that are not ours, through transformers' own code: held against transformers and peft as ours are."""

import copy
import json
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import EngineBench
from paged_model import PagedModel, random_tokens, true_logits
from tiny_families import Family, make_family_adapter, make_tiny
from tiny_models import load_peft, make_peft_adapter, make_tiny_llama, unload_peft
from transformers import PreTrainedModel
from truth import Truth

from loraplex_models.adapters.finish import check_against_base
from loraplex_models.adapters.manifest import check_adapter
from loraplex_models.adapters.slots import AdapterSlots
from loraplex_models.adapters.weights import load_adapter_weights
from loraplex_models.architectures import ARCHITECTURES
from loraplex_models.checkpoint import CheckpointError
from loraplex_models.config import read_config
from loraplex_models.decoder import CausalLM
from loraplex_models.loader import load_model
from loraplex_models.parallel import ParallelGroup
from loraplex_models.transformers_modules import attention_function

TOLERANCE = 1e-3
RANKS = (4, 7)
GLM_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj")
MIXED_WINDOWS = {"sliding_window": 9, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
OTHERS = {
    "OLMo": Family("OlmoForCausalLM", {"clip_qkv": 0.4}),
    "GLM-4": Family("Glm4ForCausalLM", {"head_dim": 32, "attention_bias": True}, GLM_LINEARS),
    "EXAONE 4": Family("Exaone4ForCausalLM", MIXED_WINDOWS),
    "Ernie 4.5": Family("Ernie4_5ForCausalLM", {"head_dim": 16, "use_bias": True, "tie_word_embeddings": True}),
    "Nemotron": Family("NemotronForCausalLM", {}, ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj")),
    "Persimmon": Family(
        "PersimmonForCausalLM",
        {"num_key_value_heads": 4},
        ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"),
    ),
    "Llama": Family("LlamaForCausalLM"),
}


@dataclass
class Case:
    """One family: transformers' model, its folder, adapters on all linears, and the one that is served."""

    family: Family
    truth: PreTrainedModel
    folder: Path
    adapters: list[Path]
    served: CausalLM


def load(folder: Path, dtype: torch.dtype = torch.float32, quantize: str | None = None) -> CausalLM:
    group, device = ParallelGroup.single(), torch.device("cpu")
    return load_model(folder, dtype=dtype, device=device, group=group, quantize=quantize, by_transformers=True)


@pytest.fixture(scope="module", params=OTHERS)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = tmp_path_factory.mktemp("other")
    family = OTHERS[request.param]
    truth = make_tiny(family, folder / "model")
    adapters = [make_family_adapter(folder / f"r{rank}", truth, family, rank) for rank in RANKS]
    return Case(family, truth, folder / "model", adapters, load(folder / "model"))


def filled_slots(case: Case) -> AdapterSlots:
    slots = AdapterSlots(case.served, len(case.adapters))
    for slot, folder in enumerate(case.adapters):
        manifest = check_adapter(folder, read_config(case.folder), max_rank=64)
        assert set(manifest.modules) == {site.module for site in case.served.lora_sites}
        assert {module.rpartition(".")[2] for module in manifest.modules} == set(case.family.linears)
        slots.set(slot, load_adapter_weights(folder, manifest, dtype=torch.float32))
    return slots


def test_mixed_batches_of_chunks_and_adapters_equal_transformers_and_peft(case: Case) -> None:
    paged = PagedModel(case.served, num_blocks=512, slots=filled_slots(case))
    tokens, slots = paged.run_mixed(num_slots=2)
    base = {name: true_logits(case.truth, tokens[name]) for name in tokens}
    for slot in (-1, 0, 1):
        model = case.truth if slot < 0 else load_peft(case.adapters[slot], case.truth)
        for name in (name for name in tokens if slots[name] == slot):
            truth = true_logits(model, tokens[name])
            assert truth.std() > 0.1, "the logits are too even to tell anything"
            assert (paged.logits(name) - truth).abs().max() < TOLERANCE, (slot, name)
            assert slot < 0 or (truth - base[name]).abs().max() > 0.05, "the adapter changes nothing"
        if slot >= 0:
            unload_peft(model)


@pytest.mark.parametrize(
    "fields",
    [{}, {"use_dora": True}, {"bias": "all"}, {"lora_bias": True}, {"use_dora": True, "use_rslora": True}],
    ids=str,
)
def test_what_adapters_bring_beside_a_and_b_acts_too(fields: dict[str, Any], tmp_path: Path) -> None:
    family = OTHERS["GLM-4"]
    truth = make_tiny(family, tmp_path / "model")
    targets = ("q_proj", "gate_up_proj") if "bias" in fields else ("q_proj", "gate_up_proj", "embed_tokens", "lm_head")
    if "lora_bias" in fields:
        targets = ("q_proj", "gate_up_proj", "lm_head")
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # peft warns of what these adapters are about: embeddings, and biases of their own
        adapter = make_peft_adapter(tmp_path / "a", copy.deepcopy(truth), target_modules=targets, **fields)
    served = load(tmp_path / "model")
    manifest = check_adapter(adapter, read_config(tmp_path / "model"), max_rank=8)
    slots = AdapterSlots(served, 1)
    slots.set(0, check_against_base(load_adapter_weights(adapter, manifest, dtype=torch.float32), served))
    paged, tokens = PagedModel(served, slots=slots), random_tokens(23)
    for name, slot in (("base", -1), ("adapted", 0)):
        paged.add(name, tokens, slot)
    for count in (9, 1, 13):
        paged.step({"base": count, "adapted": count})
    base = true_logits(truth, tokens)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = true_logits(load_peft(adapter, truth), tokens)
    assert (paged.logits("base") - base).abs().max() < TOLERANCE
    assert (paged.logits("adapted") - adapted).abs().max() < TOLERANCE
    assert (adapted - base).abs().max() > 0.05


def test_weights_are_counted(case: Case) -> None:
    stored = sum(parameter.nbytes for parameter in case.truth.parameters())
    if case.served.config.tie_embeddings:  # the head is a packed copy
        stored += case.truth.get_input_embeddings().weight.nbytes
    assert case.served.num_bytes == stored


def test_bfloat16_and_int8_stay_near_float32(case: Case) -> None:
    tokens = random_tokens(50)
    truth = true_logits(case.truth, tokens)
    for quantize, most in ((None, 0.06), ("int8", 0.12)):
        paged = PagedModel(load(case.folder, torch.bfloat16, quantize))
        paged.add("a", tokens)
        assert (paged.run_alone("a", 20).float() - truth).abs().mean() < most * truth.std()


@pytest.mark.parametrize("name", ["OLMo", "GLM-4", "EXAONE 4"])
def test_the_engine_answers_as_transformers_and_peft_do(name: str, tmp_path: Path) -> None:
    family = OTHERS[name]
    model = make_tiny(family, tmp_path / "model")
    adapters = {
        adapter: make_family_adapter(tmp_path / adapter, model, family, rank)
        for adapter, rank in (("one", 3), ("two", 8))
    }
    bench = EngineBench(tmp_path / "model", adapters, by_transformers=True)
    shared = random_tokens(33, seed=5)  # two whole blocks of it are computed once for each adapter
    requests = {
        f"{adapter}{length}": (shared[:length] + random_tokens(length % 5, seed=length), adapter)
        for adapter in (None, "one", "two")
        for length in (2, 17, 33)
    }
    truth = Truth(model, adapters)
    for turn in ("first", "again"):
        for request_id, (prompt, adapter) in requests.items():
            bench.add(f"{turn} {request_id}", prompt, adapter, max_new_tokens=12)
        bench.run()
        for request_id, (prompt, adapter) in requests.items():
            assert truth.objection(adapter, prompt, bench.answer(f"{turn} {request_id}"), {2}) is None


def test_no_family_of_ours_is_needed_for_these() -> None:
    assert {family.architecture for family in OTHERS.values()} & set(ARCHITECTURES) == {"LlamaForCausalLM"}


REFUSED = {
    "experts": (
        Family("Qwen3MoeForCausalLM", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 40}),
        "experts are kept otherwise",
    ),
    "its own attention": (Family("StableLmForCausalLM"), "takes no other attention"),
    "a state space": (Family("MambaForCausalLM"), "takes no other attention"),
    "other heads for keys than for values": (Family("DeepseekV3ForCausalLM", {"first_k_dense_replace": 3}), "heads"),
    "a scaled embedding": (Family("GemmaForCausalLM", {"head_dim": 16}), "embedding or its head"),
    "names that adapters are not checked for": (Family("PhiForCausalLM"), "its linears are mlp.fc1"),
    "a window that its code does not know": (Family("OlmoForCausalLM", {"sliding_window": 9}), "windows"),
    "chunks": (Family("Llama4ForCausalLM"), "its layers are chunked_attention"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_would_not_run_truly_is_refused(what: str, tmp_path: Path) -> None:
    family, message = REFUSED[what]
    make_tiny(family, tmp_path)
    with pytest.raises(CheckpointError, match=message) as caught:
        load(tmp_path)
    assert family.architecture in str(caught.value)


@pytest.mark.parametrize("argument", ["s_aux", "softcap", "attention_mask"])
def test_attention_that_asks_for_more_is_refused(argument: str) -> None:
    heads = dict.fromkeys(("query", "key", "value"), torch.zeros(1, 2, 3, 8))
    with pytest.raises(CheckpointError, match=f"not plain causal attention .{argument}"):
        attention_function(torch.nn.Identity(), **({"attention_mask": None} | heads | {argument: torch.ones(2)}))


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"device": torch.device("cuda")}, "one rank and on a CPU only"),
        ({"rope_scaling": "linear", "rope_factor": 2.0}, "no --rope-scaling"),
    ],
)
def test_what_is_asked_for_beside_it_is_refused_where_it_is_not_served(
    asked: dict[str, Any], message: str, tmp_path: Path
) -> None:
    make_tiny(OTHERS["OLMo"], tmp_path)
    plain = {"dtype": torch.float32, "device": torch.device("cpu"), "group": ParallelGroup.single()}
    with pytest.raises(CheckpointError, match=message):
        load_model(tmp_path, by_transformers=True, **(plain | asked))


def test_a_quantised_checkpoint_is_refused(tmp_path: Path) -> None:
    make_tiny(OTHERS["OLMo"], tmp_path)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4, "group_size": 32}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(CheckpointError, match="no quantised checkpoint"):
        load(tmp_path)


def test_a_file_without_a_weight_is_refused(tmp_path: Path) -> None:
    make_tiny(OTHERS["OLMo"], tmp_path)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 4}), encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"no tensor 'model\.layers\.3"):
        load(tmp_path)


def test_without_the_package_the_refusal_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_tiny_llama(tmp_path)
    monkeypatch.setitem(sys.modules, "loraplex_models.transformers_model", None)
    with pytest.raises(CheckpointError, match=r"pip install 'loraplex\[transformers\]'"):
        load(tmp_path)


def test_a_family_that_is_not_ours_is_refused_with_the_way_to_run_it(tmp_path: Path) -> None:
    make_tiny(OTHERS["OLMo"], tmp_path)
    with pytest.raises(CheckpointError, match=r"'OlmoForCausalLM' is not served; served are Llama.*--modeling transf"):
        load_model(tmp_path, dtype=torch.float32, device=torch.device("cpu"), group=ParallelGroup.single())
