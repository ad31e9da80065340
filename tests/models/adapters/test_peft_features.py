"""Everything that PEFT can put into a LoRA adapter, in one mixed batch against peft; the run prints a table."""

import copy
import random
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from paged_model import PagedModel, true_logits
from peft import LoraConfig, TrainableTokensConfig, get_peft_model
from tiny_families import FAMILIES, make_tiny
from tiny_models import load_peft, make_peft_adapter, make_tiny_llama, peft_warnings_ignored
from transformers import PreTrainedModel

from loraplex_models.adapters import finish
from loraplex_models.adapters.finish import check_against_base, finish_linear, row_squares
from loraplex_models.adapters.manifest import ManifestError, check_adapter
from loraplex_models.adapters.slots import AdapterSlots
from loraplex_models.adapters.weights import ModuleParts, load_adapter_weights
from loraplex_models.decoder import CausalLM
from loraplex_models.loader import load_model
from loraplex_models.parallel import ParallelGroup
from loraplex_quant.method import ALL_ROWS

TOLERANCE = 1e-3
BASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "tied": {"tie_word_embeddings": True},
}


@dataclass(frozen=True)
class Feature:
    """Fields of LoraConfig, and the tiny base that they need."""

    fields: dict[str, Any] = field(default_factory=dict)
    base: str = "plain"
    targets: tuple[str, ...] = ("q_proj", "v_proj", "down_proj")


ENDS = ("q_proj", "embed_tokens", "lm_head")
BLOCKS = {"target_modules_bd_a": ["down_proj"], "target_modules_bd_b": ["q_proj"], "nblocks": 4, "match_strict": False}
FEATURES = {
    "plain": Feature(),
    "rsLoRA": Feature({"use_rslora": True}),
    "rank and alpha patterns": Feature({"rank_pattern": {"q_proj": 2, "proj": 5}, "alpha_pattern": {"v_proj": 3}}),
    "layer subset": Feature({"layers_to_transform": [1]}),
    "all-linear": Feature(targets=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")),
    "EVA-like rank pattern, alpha 0.5": Feature({"lora_alpha": 0.5, "rank_pattern": {"layers.0.mlp.down_proj": 7}}),
    "DoRA": Feature({"use_dora": True}),
    "DoRA, rsLoRA, base with biases": Feature({"use_dora": True, "use_rslora": True}, base="biases"),
    "DoRA, bias all": Feature({"use_dora": True, "bias": "all"}, base="biases"),
    "DoRA on embeddings and lm_head": Feature({"use_dora": True}, targets=ENDS),
    "bias all": Feature({"bias": "all"}, base="biases"),
    "bias lora_only": Feature({"bias": "lora_only"}, base="biases"),
    "lora_bias": Feature({"lora_bias": True}),
    "lora_bias on lm_head, with bias all": Feature(
        {"lora_bias": True, "bias": "all"}, base="biases", targets=("o_proj", "lm_head")
    ),
    "modules_to_save lm_head": Feature({"modules_to_save": ["lm_head"]}),
    "modules_to_save embed_tokens": Feature({"modules_to_save": ["embed_tokens"]}),
    "modules_to_save both": Feature({"modules_to_save": ["lm_head", "embed_tokens"]}),
    "modules_to_save, tied base, embedding": Feature({"modules_to_save": ["embed_tokens"]}, base="tied"),
    "modules_to_save, tied base, both": Feature({"modules_to_save": ["embed_tokens", "lm_head"]}, base="tied"),
    "modules_to_save, tying ensured": Feature(
        {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, base="tied"
    ),
    "LoRA on embed_tokens": Feature(targets=("q_proj", "embed_tokens")),
    "LoRA on lm_head": Feature(targets=("q_proj", "lm_head")),
    "LoRA on both ends": Feature(targets=ENDS),
    "LoRA on embed_tokens, tied base": Feature(base="tied", targets=("q_proj", "embed_tokens")),
    "LoRA on embed_tokens, tying ensured": Feature(
        {"ensure_weight_tying": True}, base="tied", targets=("q_proj", "embed_tokens")
    ),
    "trainable tokens": Feature({"trainable_token_indices": [300, 7, 12]}),
    "trainable tokens of both ends": Feature(
        {"trainable_token_indices": {"embed_tokens": [7, 3], "lm_head": [400, 5, 9]}}
    ),
    "trainable tokens, tied base": Feature({"trainable_token_indices": [300, 7, 12]}, base="tied"),
    "BD-LoRA": Feature({"use_bdlora": BLOCKS}),
    "aLoRA": Feature({"alora_invocation_tokens": [401, 402]}),
    "aLoRA with lora_bias": Feature({"alora_invocation_tokens": [5], "lora_bias": True}, targets=("k_proj", "lm_head")),
    "PiSSA, converted": Feature({"init_lora_weights": "pissa"}),
    "OLoRA, converted": Feature({"init_lora_weights": "olora"}),
    "peft type TRAINABLE_TOKENS": Feature({"token_indices": [7, 300, 12]}),
    "peft type TRAINABLE_TOKENS, tied base": Feature({"token_indices": [300, 7, 12]}, base="tied"),
    "q only, rank 1": Feature({"r": 1, "lora_alpha": 1}, targets=("q_proj",)),
    "rank 64": Feature({"r": 64}),
}


@dataclass
class World:
    """A tiny base, ours and transformers', and every feature's adapter on it."""

    model: CausalLM
    truth: PreTrainedModel
    folders: dict[str, Path]


def make_token_rows(folder: Path, model: PreTrainedModel, token_ids: list[int]) -> Path:
    with peft_warnings_ignored(), torch.random.fork_rng():
        torch.manual_seed(1)
        config = TrainableTokensConfig(token_indices=token_ids, task_type="CAUSAL_LM")
        adapted = get_peft_model(copy.deepcopy(model), config)
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if "trainable_tokens_delta" in name:
                    parameter.normal_(std=0.2)
        adapted.save_pretrained(str(folder))
    return folder


def make_converted(folder: Path, model: PreTrainedModel, init: str) -> Path:
    """Train on a base that the initialisation has changed, and let peft save what does the same on the plain base."""
    config = LoraConfig(r=4, lora_alpha=8, init_lora_weights=init, target_modules=["q_proj", "down_proj"])
    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore")  # peft advises to convert, which is what happens here
        torch.manual_seed(1)
        adapted = get_peft_model(copy.deepcopy(model), config)
        adapted.peft_config["default"].init_lora_weights = True
        adapted.save_pretrained(str(folder / "init"))
        adapted.peft_config["default"].init_lora_weights = init
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if "lora_" in name:
                    parameter.add_(torch.randn_like(parameter), alpha=0.2)
        adapted.save_pretrained(str(folder), path_initial_model_for_weight_conversion=str(folder / "init"))
    return folder


def make_adapter(folder: Path, model: PreTrainedModel, feature: Feature) -> Path:
    fields = dict(feature.fields)
    if init := fields.get("init_lora_weights"):
        return make_converted(folder, model, init)
    if ids := fields.get("token_indices"):
        return make_token_rows(folder, model, ids)
    rank, alpha = fields.pop("r", 4), fields.pop("lora_alpha", 8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft warns of what these adapters are about: embeddings that it saves too
        return make_peft_adapter(
            folder, copy.deepcopy(model), rank=rank, alpha=alpha, target_modules=feature.targets, **fields
        )


@pytest.fixture(scope="module", params=BASES)
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("world")
    truth = make_tiny_llama(folder / "model", **BASES[request.param])
    model = load_model(folder / "model", dtype=torch.float32, device=torch.device("cpu"), group=ParallelGroup.single())
    names = [name for name, feature in FEATURES.items() if feature.base == request.param]
    folders = {name: make_adapter(folder / str(i), truth, FEATURES[name]) for i, name in enumerate(names)}
    return World(model, truth, folders)


@pytest.fixture(scope="module")
def table(request: pytest.FixtureRequest) -> Iterator[dict[str, tuple[float, float]]]:
    rows: dict[str, tuple[float, float]] = {}
    yield rows
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print("\n\nadapter feature, files by peft: largest difference of a logit from peft, and from the base, float32")
        for name in FEATURES:
            if name in rows:
                print(f"{name:40}  {rows[name][0]:.0e}  {rows[name][1]:.1f}")


def peft_logits(folder: Path, truth: PreTrainedModel, prompts: list[list[int]]) -> list[torch.Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = load_peft(folder, copy.deepcopy(truth))
    return [true_logits(adapted, tokens) for tokens in prompts]


def filled(world: World, names: list[str]) -> AdapterSlots:
    slots = AdapterSlots(world.model, len(names))
    for slot, name in enumerate(names):
        manifest = check_adapter(world.folders[name], world.model.config, max_rank=64)
        weights = load_adapter_weights(world.folders[name], manifest, dtype=torch.float32)
        slots.set(slot, check_against_base(weights, world.model))
    return slots


def test_every_feature_in_one_mixed_batch_equals_peft(world: World, table: dict[str, tuple[float, float]]) -> None:
    names = list(world.folders)
    paged = PagedModel(world.model, num_blocks=2048, slots=filled(world, names))
    draw = random.Random(5)
    prompts = {name: [[draw.randrange(512) for _ in range(n)] for n in (14, 37)] for name in ["base", *names]}
    starts = {name: 0 for name in prompts}
    for name, tokens in prompts.items():
        tokens[0][:3] = [7, 300, 12]  # those that trainable tokens replace
        if wake := FEATURES[name].fields.get("alora_invocation_tokens") if name in FEATURES else None:
            starts[name] = 6
            for prompt in tokens:
                prompt[6:] = [*wake, *(token % 400 + 6 for token in prompt[6 + len(wake) :])]
    sequences = {f"{name}/{i}": tokens for name, both in prompts.items() for i, tokens in enumerate(both)}
    for name, tokens in sequences.items():
        owner = name.rpartition("/")[0]
        paged.add(name, tokens, -1 if owner == "base" else names.index(owner), adapter_start=starts[owner])
    while waiting := [name for name in sequences if paged.remaining(name)]:
        chosen = draw.sample(waiting, draw.randint(1, len(waiting)))
        paged.step({name: min(draw.choice((1, 1, 2, 7, 36)), paged.remaining(name)) for name in chosen})
    base = [true_logits(world.truth, tokens) for tokens in prompts["base"]]
    for i, truth in enumerate(base):
        assert (paged.logits(f"base/{i}") - truth).abs().max() < 1e-4
    for name in names:
        truths = peft_logits(world.folders[name], world.truth, prompts[name])
        error = max(float((paged.logits(f"{name}/{i}") - truth).abs().max()) for i, truth in enumerate(truths))
        effect = max(
            float((truth - true_logits(world.truth, tokens)).abs().max())
            for truth, tokens in zip(truths, prompts[name], strict=True)
        )
        table[name] = (error, effect)
    wrong = {name: table[name] for name in names if table[name][0] > TOLERANCE or table[name][1] < 0.1}
    assert not wrong


def test_without_what_is_beside_the_products_the_answer_would_be_wrong(world: World) -> None:
    tokens = [7, 300, 12, 401, 402, 5, 99, 3]
    for name, folder in world.folders.items():
        manifest = check_adapter(folder, world.model.config, max_rank=64)
        weights = load_adapter_weights(folder, manifest, dtype=torch.float32)
        if not (weights.parts or any(end.changes for end in (manifest.embedding, manifest.head) if end)):
            continue
        slots = AdapterSlots(world.model, 2)
        slots.set(0, weights)
        slots.set(1, replace(weights, parts={}, ends={}))
        paged = PagedModel(world.model, slots=slots)
        for slot in (0, 1):
            paged.add(str(slot), tokens, slot)
        paged.step({"0": 8, "1": 8})
        assert (paged.logits("0") - paged.logits("1")).abs().max() > 0.1, name


@pytest.mark.parametrize("chunk", [1 << 40, 1000])
def test_a_copy_of_the_bases_own_matrix_is_compared_and_not_kept(
    chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(finish.CHUNK_ELEMENTS, "cpu", chunk)
    truth = make_tiny_llama(tmp_path / "model")
    cpu = torch.device("cpu")
    model = load_model(tmp_path / "model", dtype=torch.float32, device=cpu, group=ParallelGroup.single())
    folder = make_adapter(tmp_path / "a", truth, Feature(targets=("lm_head",)))
    manifest = check_adapter(folder, model.config, max_rank=64)
    weights = load_adapter_weights(folder, manifest, dtype=torch.float32)
    assert weights.ends["lm_head"].base_copy is not None
    checked = check_against_base(weights, model)
    assert checked.ends["lm_head"].base_copy is None and checked.ends["lm_head"].pair is not None
    other = make_tiny_llama(tmp_path / "other", seed=9)
    folder = make_adapter(tmp_path / "b", other, Feature(targets=("lm_head",)))
    manifest = check_adapter(folder, model.config, max_rank=64)
    with pytest.raises(ManifestError, match="copy of the base's lm_head is another matrix"):
        check_against_base(load_adapter_weights(folder, manifest, dtype=torch.float32), model)


class OneLinear:
    """A base of one linear, for what real ones seldom have."""

    first_token = 0
    device = torch.device("cpu")

    def __init__(self, weight: torch.Tensor) -> None:
        self._weight = weight

    def base_weight(self, module: str, rows: slice = ALL_ROWS) -> torch.Tensor:
        return self._weight[rows]

    def base_bias(self, module: str) -> torch.Tensor | None:
        return None


def test_doras_gain_is_the_same_a_few_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = torch.Generator().manual_seed(1)
    weight, a, b = (torch.randn(*shape, generator=draw) for shape in ((37, 10), (3, 10), (37, 3)))
    parts = ModuleParts(magnitude=torch.rand(37, generator=draw) + 0.5)
    whole_pair, whole = finish_linear(OneLinear(weight), "any", (a, b), parts, {})
    monkeypatch.setitem(finish.CHUNK_ELEMENTS, "cpu", 85)
    pair, change = finish_linear(OneLinear(weight), "any", (a, b), parts, {})
    assert pair is not None and whole_pair is not None
    assert change.gain_minus_one is not None and whole.gain_minus_one is not None
    torch.testing.assert_close(change.gain_minus_one, whole.gain_minus_one)
    torch.testing.assert_close(pair[1], whole_pair[1])
    of_columns = row_squares(OneLinear(weight), "embed_tokens", (b.t(), a.t()))
    torch.testing.assert_close(of_columns, (weight.t() + a.t() @ b.t()).square().sum(1))


def test_dora_of_a_row_of_zeros_gives_nothing_and_of_a_huge_length_is_refused() -> None:
    weight = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    pair = torch.zeros(1, 2), torch.zeros(2, 1)
    _, change = finish_linear(OneLinear(weight), "any", pair, ModuleParts(magnitude=torch.tensor([10.0, 1.0])), {})
    assert change.gain_minus_one is not None and change.gain_minus_one.tolist() == [1.0, -1.0]
    half = torch.ones(1, 2).half(), torch.ones(2, 1).half()
    with pytest.raises(ValueError, match=r"do not fit into torch\.float16"):
        finish_linear(OneLinear(weight), "any", half, ModuleParts(magnitude=torch.tensor([1e6, 1.0])), {})


def test_a_trained_bias_of_a_linear_without_one_is_refused(tmp_path: Path) -> None:
    make_tiny_llama(tmp_path / "model")
    cpu = torch.device("cpu")
    model = load_model(tmp_path / "model", dtype=torch.float32, device=cpu, group=ParallelGroup.single())
    biased = make_tiny_llama(tmp_path / "biased", **BASES["biases"])
    folder = make_adapter(tmp_path / "a", biased, Feature({"bias": "all"}))
    manifest = check_adapter(folder, model.config, max_rank=64)
    with pytest.raises(ManifestError, match="which has none in the base model") as caught:
        check_against_base(load_adapter_weights(folder, manifest, dtype=torch.float32), model)
    assert caught.value.error_type == "adapter_incompatible"


def test_plain_adapters_carry_nothing_more(world: World) -> None:
    names = list(world.folders)
    slots = filled(world, names)
    for slot, name in enumerate(names):
        lora = slots.route((0, 3), (slot,))
        assert lora is not None
        manifest = check_adapter(world.folders[name], world.model.config, max_rank=64)
        has_nothing_more = lora.extras is None and lora.embedding is None and lora.head is None
        assert has_nothing_more == (manifest.is_plain or name == "aLoRA"), name
    for slot in range(len(names)):
        slots.clear(slot)
    lora = slots.route((0, 3), (0,))
    assert lora is not None
    assert lora.extras is None and lora.embedding is None and lora.head is None and not any(lora.tables)


def test_dora_takes_its_lengths_from_a_quantised_base_as_it_is_served(tmp_path: Path) -> None:
    truth = make_tiny_llama(tmp_path / "model")
    model = load_model(
        tmp_path / "model", dtype=torch.float32, device=torch.device("cpu"), group=ParallelGroup.single(),
        quantize="bitsandbytes-nf4",
    )  # fmt: skip
    plain = {name: parameter.clone() for name, parameter in truth.named_parameters()}
    with torch.no_grad():
        for site in model.lora_sites:
            truth.get_submodule(f"model.{site.module}").weight.copy_(model.base_weight(site.module))
        differences = [(parameter - plain[name]).abs().max() for name, parameter in truth.named_parameters()]
    assert max(differences) > 0.01, "nothing was quantised"
    adapter = make_peft_adapter(tmp_path / "dora", truth, use_dora=True)
    slots = AdapterSlots(model, 1)
    manifest = check_adapter(adapter, model.config, max_rank=64)
    slots.set(0, load_adapter_weights(adapter, manifest, dtype=torch.float32))
    paged = PagedModel(model, slots=slots)
    tokens = list(range(3, 40))
    paged.add("a", tokens, 0)
    error = (paged.run_alone("a", 30) - peft_logits(adapter, truth, [tokens])[0]).abs().max()
    assert error < TOLERANCE


def test_a_head_with_a_bias_keeps_it_under_dora_and_is_not_replaced(tmp_path: Path) -> None:
    truth = make_tiny(FAMILIES["Phi-2"], tmp_path / "model")
    assert truth.lm_head.bias is not None
    model = load_model(
        tmp_path / "model", dtype=torch.float32, device=torch.device("cpu"), group=ParallelGroup.single()
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft saves the base's head too, and says so
        adapter = make_peft_adapter(
            tmp_path / "dora", copy.deepcopy(truth), use_dora=True, target_modules=["q_proj", "lm_head"]
        )
        rows = make_peft_adapter(
            tmp_path / "rows", copy.deepcopy(truth), target_modules=["q_proj"], trainable_token_indices={"lm_head": [5]}
        )
    world = World(model, truth, {"dora": adapter, "rows": rows})
    paged = PagedModel(model, slots=filled(world, ["dora"]))
    tokens = list(range(3, 30))
    paged.add("a", tokens, 0)
    error = (paged.run_alone("a", 20) - peft_logits(adapter, truth, [tokens])[0]).abs().max()
    assert error < TOLERANCE
    with pytest.raises(ManifestError, match="head has a bias"):
        filled(world, ["rows"])
