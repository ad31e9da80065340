"""Every served family against transformers and peft on a tiny random checkpoint; the run prints the table of errors."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from engines import EngineBench
from paged_model import PagedModel, random_tokens, true_logits
from tiny_families import FAMILIES, Family, make_family_adapter, make_tiny
from tiny_models import load_peft, make_peft_adapter, unload_peft
from transformers import PreTrainedModel
from truth import Truth

from loraplex_models.adapters.manifest import ManifestError, check_adapter
from loraplex_models.adapters.slots import AdapterSlots
from loraplex_models.adapters.weights import load_adapter_weights
from loraplex_models.architectures import ARCHITECTURES
from loraplex_models.config import ModelConfigError, parse_config, read_config
from loraplex_models.decoder import CausalLM
from loraplex_models.loader import load_model
from loraplex_models.names import served_names
from loraplex_models.parallel import ParallelGroup

TOLERANCE = 1e-4
# The adapters are strong, and at single positions one float32 rounding of the embeddings then moves a logit by 5e-5.
LORA_TOLERANCE = 5e-4
RANKS = (4, 7)


@dataclass
class Case:
    """One family: transformers' model, its folder, adapters on all linears, and ours."""

    family: Family
    truth: PreTrainedModel
    folder: Path
    adapters: list[Path]
    ours: CausalLM


def load(folder: Path, dtype: torch.dtype = torch.float32) -> CausalLM:
    return load_model(folder, dtype=dtype, device=torch.device("cpu"), group=ParallelGroup.single())


@pytest.fixture(scope="module", params=FAMILIES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = tmp_path_factory.mktemp("family")
    family = FAMILIES[request.param]
    truth = make_tiny(family, folder / "model")
    adapters = [make_family_adapter(folder / f"r{rank}", truth, family, rank) for rank in RANKS]
    return Case(family, truth, folder / "model", adapters, load(folder / "model"))


@pytest.fixture(scope="module")
def table(request: pytest.FixtureRequest) -> Iterator[dict[str, dict[str, float]]]:
    rows: dict[str, dict[str, float]] = {}
    yield rows
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print("\n\nlargest difference of a logit from transformers and peft, float32")
        for name, errors in rows.items():
            print(f"{name:28}" + "".join(f"  {what} {error:.0e}" for what, error in errors.items()))


def row_of(request: pytest.FixtureRequest, table: dict[str, dict[str, float]]) -> dict[str, float]:
    return table.setdefault(request.node.callspec.params["case"], {})


def filled_slots(case: Case) -> AdapterSlots:
    slots = AdapterSlots(case.ours, len(case.adapters))
    for slot, folder in enumerate(case.adapters):
        manifest = check_adapter(folder, read_config(case.folder), max_rank=64)
        served = served_names(case.family.architecture)
        linears = {served(f".mlp.{name}").rpartition(".")[2] for name in case.family.linears}
        linears |= {
            served(f".{block}.{name}").rpartition(".")[2] for block in ("self_attn", "attn") for name in linears
        }
        sites = [site.module for site in case.ours.lora_sites]
        assert set(manifest.modules) == {site for site in sites if site.rpartition(".")[2] in linears}
        slots.set(slot, load_adapter_weights(folder, manifest, dtype=torch.float32))
    return slots


def test_base_logits_equal_those_of_transformers(
    case: Case, request: pytest.FixtureRequest, table: dict[str, dict[str, float]]
) -> None:
    tokens = random_tokens(41)
    paged = PagedModel(case.ours)
    paged.add("a", tokens)
    truth = true_logits(case.truth, tokens)
    assert truth.std() > 0.1, "the logits are too even to tell anything"
    error = float((paged.run_alone("a", 41) - truth).abs().max())
    row_of(request, table)["base logits"] = error
    assert error < TOLERANCE


def test_mixed_batches_of_chunks_and_adapters_equal_transformers_and_peft(
    case: Case, request: pytest.FixtureRequest, table: dict[str, dict[str, float]]
) -> None:
    paged = PagedModel(case.ours, num_blocks=512, slots=filled_slots(case))
    tokens, slots = paged.run_mixed(num_slots=2)
    for slot in (-1, 0, 1):
        model = case.truth if slot < 0 else load_peft(case.adapters[slot], case.truth)
        errors = [
            float((paged.logits(name) - true_logits(model, tokens[name])).abs().max())
            for name in tokens
            if slots[name] == slot
        ]
        if slot >= 0:
            unload_peft(model)
        what = "mixed, base" if slot < 0 else f"mixed, LoRA r{RANKS[slot]}"
        row_of(request, table)[what] = max(errors)
        assert max(errors) < (TOLERANCE if slot < 0 else LORA_TOLERANCE), what


def test_adapters_change_every_family(case: Case) -> None:
    paged = PagedModel(case.ours, slots=filled_slots(case))
    for name, slot in (("base", -1), ("first", 0), ("second", 1)):
        paged.add(name, random_tokens(9), slot)
        paged.run_alone(name, 9)
    for one, other in (("base", "first"), ("first", "second")):
        assert (paged.logits(one) - paged.logits(other)).abs().max() > 0.05


def test_bfloat16_stays_near_float32(case: Case) -> None:
    tokens = random_tokens(50)
    paged = PagedModel(load(case.folder, torch.bfloat16))
    paged.add("a", tokens)
    ours = paged.run_alone("a", 20).float()
    truth = true_logits(case.truth, tokens)
    assert (ours - truth).abs().mean() < 0.06 * truth.std()


def test_weights_are_counted(case: Case) -> None:
    stored = sum(parameter.nbytes for parameter in case.truth.parameters())
    if case.ours.config.tie_embeddings:  # the head is a packed copy
        stored += case.truth.get_input_embeddings().weight.nbytes
    # The weights of query and key norms are kept once a head.
    assert 0 <= case.ours.num_bytes - stored < 0.01 * stored


@pytest.mark.parametrize(
    "name", ["Qwen2, window in some layers", "Gemma 2", "Gemma 3, text", "Phi-3", "Starcoder2", "Command-R", "GPT-2"]
)
def test_the_engine_answers_as_transformers_and_peft_do(name: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    model = make_tiny(family, tmp_path / "model")
    adapters = {
        adapter: make_family_adapter(tmp_path / adapter, model, family, rank)
        for adapter, rank in (("one", 3), ("two", 8))
    }
    bench = EngineBench(tmp_path / "model", adapters)
    requests = {
        f"{adapter}{length}": (random_tokens(length, seed=length), adapter)
        for adapter in (None, "one", "two")
        for length in (2, 17, 40)
    }
    for request_id, (prompt, adapter) in requests.items():
        bench.add(request_id, prompt, adapter, max_new_tokens=12)
    bench.run()
    truth = Truth(model, adapters)
    for request_id, (prompt, adapter) in requests.items():
        assert truth.objection(adapter, prompt, bench.answer(request_id), {2}) is None


def test_every_architecture_of_the_registry_is_in_the_table() -> None:
    assert {family.architecture for family in FAMILIES.values()} == set(ARCHITECTURES)


def test_the_page_of_models_names_what_is_served_and_nothing_else() -> None:
    page = (Path(__file__).parents[2] / "docs" / "models.md").read_text(encoding="utf-8")
    assert sorted(re.findall(r"`(\w+(?:ForCausalLM|LMHeadModel))`", page)) == sorted(ARCHITECTURES)


def test_an_adapter_with_packed_names_is_refused_by_a_family_without_them(tmp_path: Path) -> None:
    phi, llama = FAMILIES["Phi-3"], FAMILIES["Llama"]
    adapter = make_peft_adapter(tmp_path / "a", make_tiny(phi, tmp_path / "phi"), target_modules=["qkv_proj"])
    make_tiny(llama, tmp_path / "llama")
    with pytest.raises(ManifestError, match="qkv_proj"):
        check_adapter(adapter, read_config(tmp_path / "llama"), max_rank=64)


PLAIN = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 4, "intermediate_size": 9, "vocab_size": 512}


def test_a_window_that_the_config_turns_off_is_none() -> None:
    config = parse_config(PLAIN | {"architectures": ["Qwen2ForCausalLM"], "sliding_window": 32768})
    assert config.sliding_window is None and config.windowed_layers is None


def test_older_configs_of_gemma_get_what_transformers_takes_for_missing_keys() -> None:
    first = parse_config(PLAIN | {"architectures": ["GemmaForCausalLM"], "hidden_act": "gelu", "eos_token_id": 1})
    assert (first.activation, first.tie_embeddings, first.head_dim) == ("gelu_pytorch_tanh", True, 256)
    assert first.end_token_ids == (1,)
    second = parse_config(PLAIN | {"architectures": ["Gemma2ForCausalLM"]}, {"eos_token_id": [1, 107]})
    assert second.windowed_layers == (0, 2) and second.sliding_window == 4096
    assert (second.attention_cap, second.logit_cap, second.attention_scale) == (50.0, 30.0, 1 / 16)
    assert second.end_token_ids == (1, 107)


def test_the_angles_of_gemma_3_are_found_in_older_configs_too() -> None:
    older = {"rope_theta": 1000000, "rope_local_base_freq": 10000, "rope_scaling": {"rope_type": "linear", "factor": 8}}
    config = parse_config(PLAIN | older | {"architectures": ["Gemma3ForCausalLM"], "num_hidden_layers": 7})
    assert (config.rope.theta, config.rope.kind, config.rope.parameters) == (1000000, "linear", {"factor": 8})
    assert config.windowed_rope is not None and config.windowed_rope.theta == 10000
    assert config.windowed_layers == (0, 1, 2, 3, 4, 6) and config.attention_cap is None


def test_layers_without_rotary_embedding_are_found() -> None:
    config = parse_config(PLAIN | {"architectures": ["SmolLM3ForCausalLM"], "num_hidden_layers": 9})
    assert config.unturned_layers == (3, 7) and config.rope.theta == 2000000


def test_a_model_whose_tokens_see_what_comes_after_is_refused() -> None:
    with pytest.raises(ModelConfigError, match="use_bidirectional_attention"):
        parse_config(PLAIN | {"architectures": ["Gemma3ForCausalLM"], "use_bidirectional_attention": True})


def test_another_rope_scaling_leaves_the_share_of_a_head_that_is_turned(tmp_path: Path) -> None:
    family = FAMILIES["Phi-4-mini, longrope"]
    make_tiny(family, tmp_path / "long")
    plain = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.75}
    truth = make_tiny(family, tmp_path / "plain", rope_parameters=plain)
    ours = load_model(
        tmp_path / "long", dtype=torch.float32, device=torch.device("cpu"), group=ParallelGroup.single(),
        rope_scaling="linear", rope_factor=1.0,
    )  # fmt: skip
    paged = PagedModel(ours)
    paged.add("a", random_tokens(20))
    assert (paged.run_alone("a", 20) - true_logits(truth, random_tokens(20))).abs().max() < TOLERANCE


def test_command_r_with_normalised_queries_is_refused() -> None:
    with pytest.raises(ModelConfigError, match="use_qk_norm"):
        parse_config(PLAIN | {"architectures": ["CohereForCausalLM"], "use_qk_norm": True})


def test_longrope_is_served_up_to_its_original_length() -> None:
    scaling = {"type": "su", "short_factor": [1.0], "long_factor": [2.0]}
    lengths = {"max_position_embeddings": 131072, "original_max_position_embeddings": 4096}
    config = parse_config(PLAIN | lengths | {"architectures": ["Phi3ForCausalLM"], "rope_scaling": scaling})
    assert config.max_positions == 4096
    assert config.rope.kind == "longrope" and config.rope.parameters["factor"] == 32
    with pytest.raises(ModelConfigError, match="original_max_position_embeddings"):
        parse_config(PLAIN | {"rope_scaling": scaling})


def test_kinds_of_layers_that_are_not_known_are_refused() -> None:
    kinds = {"sliding_window": 8, "layer_types": ["full_attention", "chunked_attention"] * 2}
    with pytest.raises(ModelConfigError, match="chunked_attention"):
        parse_config(PLAIN | kinds)
