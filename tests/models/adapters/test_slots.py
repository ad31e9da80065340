"""Mixed batches of adapters against peft, each adapter alone."""

import copy
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from paged_model import PagedModel, random_tokens
from tiny_models import load_peft, make_peft_adapter, make_tiny_llama

from loraplex_models.adapters.manifest import check_adapter
from loraplex_models.adapters.slots import AdapterSlots
from loraplex_models.adapters.weights import AdapterWeights, load_adapter_weights
from loraplex_models.decoder import CausalLM
from loraplex_models.loader import load_model
from loraplex_models.parallel import ParallelGroup

ADAPTERS: dict[str, dict[str, Any]] = {
    "all": {"rank": 4},
    "wide": {"rank": 16},
    "query value": {"rank": 8, "target_modules": ["q_proj", "v_proj"]},
    "mlp": {"rank": 3, "target_modules": ["up_proj", "down_proj"]},
    "one layer": {"rank": 4, "layers_to_transform": [1]},
    "patterns": {"rank": 4, "rank_pattern": {"q_proj": 2, "layers.1.mlp.gate_proj": 7}, "alpha_pattern": {"k_proj": 3}},
    "rslora": {"rank": 8, "use_rslora": True, "target_modules": ["o_proj", "k_proj"]},
}
BASE = "base"


@dataclass
class World:
    """One tiny model, adapters by name, and the true logits of each."""

    model: CausalLM
    weights: dict[str, AdapterWeights]
    true_logits: Callable[[str, list[int]], torch.Tensor]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder: Path = tmp_path_factory.mktemp("world")
    base = make_tiny_llama(folder / "model")
    model = load_model(folder / "model", dtype=torch.float32, device=torch.device("cpu"), group=ParallelGroup.single())
    weights: dict[str, AdapterWeights] = {}
    truths: dict[str, Any] = {BASE: copy.deepcopy(base)}
    for seed, (name, settings) in enumerate(ADAPTERS.items()):
        make_peft_adapter(folder / name, base, seed=seed, **settings)
        manifest = check_adapter(folder / name, model.config, max_rank=64)
        weights[name] = load_adapter_weights(folder / name, manifest, dtype=torch.float32)
        truths[name] = load_peft(folder / name, copy.deepcopy(base))

    def true_logits(name: str, tokens: list[int]) -> torch.Tensor:
        with torch.inference_mode():
            logits: torch.Tensor = truths[name](torch.tensor([tokens])).logits[0]
        return logits

    return World(model, weights, true_logits)


def filled_slots(world: World) -> tuple[AdapterSlots, dict[str, int]]:
    slots = AdapterSlots(world.model, len(world.weights))
    places = {BASE: -1}
    for slot, (name, weights) in enumerate(world.weights.items()):
        slots.set(slot, weights)
        places[name] = slot
    return slots, places


def assert_true(world: World, paged: PagedModel, sequence: str, adapter: str, tokens: list[int]) -> None:
    assert (paged.logits(sequence) - world.true_logits(adapter, tokens)).abs().max() < 2e-4


@pytest.mark.parametrize("name", ADAPTERS)
def test_each_adapter_alone_equals_peft(name: str, world: World) -> None:
    slots, places = filled_slots(world)
    paged = PagedModel(world.model, slots=slots)
    tokens = random_tokens(20, 1)
    paged.add("s", tokens, places[name])
    paged.run_alone("s", 19)
    assert_true(world, paged, "s", name, tokens)
    assert (paged.logits("s") - world.true_logits(BASE, tokens)).abs().max() > 0.1


@pytest.mark.parametrize("seed", range(10))
def test_random_mixes_of_adapters_equal_each_alone(seed: int, world: World) -> None:
    slots, places = filled_slots(world)
    paged = PagedModel(world.model, slots=slots, num_blocks=512)
    draw = random.Random(seed)
    sequences = {f"s{i}": draw.choice([BASE, BASE, *ADAPTERS]) for i in range(9)}
    tokens = {name: random_tokens(draw.choice((4, 20, 60)), 10 * seed + i) for i, name in enumerate(sequences)}
    for name, adapter in sequences.items():
        paged.add(name, tokens[name], places[adapter])
    while waiting := [name for name in sequences if paged.remaining(name)]:
        chosen = draw.sample(waiting, draw.randint(1, len(waiting)))
        paged.step({name: min(draw.choice((1, 1, 5, 40)), paged.remaining(name)) for name in chosen})
    for name, adapter in sequences.items():
        assert_true(world, paged, name, adapter, tokens[name])


@pytest.mark.parametrize("mix", [["all"] * 6, list(ADAPTERS), ["all"] * 5 + ["wide"], [BASE] * 5 + ["mlp"]])
def test_identical_distinct_and_skewed_batches_equal_each_alone(mix: list[str], world: World) -> None:
    slots, places = filled_slots(world)
    paged = PagedModel(world.model, slots=slots)
    tokens = {f"s{i}": random_tokens(7, i) for i in range(len(mix))}
    for name, adapter in zip(tokens, mix, strict=True):
        paged.add(name, tokens[name], places[adapter])
    paged.step(dict.fromkeys(tokens, 5))
    paged.step(dict.fromkeys(tokens, 1))
    paged.step(dict.fromkeys(tokens, 1))
    for name, adapter in zip(tokens, mix, strict=True):
        assert_true(world, paged, name, adapter, tokens[name])


def test_base_tokens_beside_adapters_are_bit_for_bit_those_without_any_adapter(world: World) -> None:
    slots, places = filled_slots(world)
    tokens = random_tokens(12, 3)
    logits = []
    for has_delta in (True, False):
        paged = PagedModel(world.model, slots=slots)
        paged.add("base", tokens)
        paged.add("other", tokens, places["wide"] if has_delta else -1)
        paged.step({"base": 11, "other": 11})
        paged.step({"base": 1, "other": 1})
        logits.append(paged.logits("base"))
    assert torch.equal(*logits)


def test_a_slot_that_was_set_anew_never_answers_with_the_old_adapter(world: World) -> None:
    slots = AdapterSlots(world.model, 2)
    tokens = random_tokens(6, 4)
    for first, second in (("all", "wide"), ("wide", "mlp"), ("query value", "all")):
        slots.set(0, world.weights[first])
        slots.set(1, world.weights[second])
        paged = PagedModel(world.model, slots=slots)
        paged.add("x", tokens, 0)
        paged.add("y", tokens, 1)
        paged.step({"x": 5, "y": 5})
        paged.step({"x": 1, "y": 1})
        assert_true(world, paged, "x", first, tokens)
        assert_true(world, paged, "y", second, tokens)
    slots.clear(1)
    batch = slots.route((0, 1), (1,))
    assert batch is not None and not any(batch.tables)


def test_linears_that_no_adapter_of_the_batch_touches_have_no_delta(world: World) -> None:
    slots, places = filled_slots(world)
    batch = slots.route((0, 3), (places["query value"],))
    assert batch is not None
    assert [table is not None for table in batch.tables] == [True, False, False, False] * 2


def test_a_batch_without_adapters_has_no_route(world: World) -> None:
    slots, _ = filled_slots(world)
    assert slots.route((0, 3, 5), (-1, -1)) is None


def test_a_step_with_the_same_segments_gets_the_same_route_until_a_slot_changes(world: World) -> None:
    slots, places = filled_slots(world)
    first = slots.route((0, 2), (places["all"],))
    assert slots.route((0, 2), (places["all"],)) is first
    slots.set(places["all"], world.weights["wide"])
    second = slots.route((0, 2), (places["all"],))
    assert second is not None and second is not first


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_refused_and_the_slot_keeps_its_adapter(value: float, world: World) -> None:
    slots = AdapterSlots(world.model, 1)
    slots.set(0, world.weights["all"])
    bad = {name: (a.clone(), b.clone()) for name, (a, b) in world.weights["all"].modules.items()}
    bad["layers.1.mlp.up_proj"][0][0, 0] = value
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj.*not finite"):
        slots.set(0, AdapterWeights("bad", 4, bad))
    assert slots.route((0, 1), (0,)) is not None


def test_a_module_that_does_not_fit_the_model_is_refused(world: World) -> None:
    slots = AdapterSlots(world.model, 1)
    with pytest.raises(ValueError, match="no linear"):
        slots.set(0, AdapterWeights("x", 2, {"layers.9.mlp.up_proj": (torch.zeros(2, 64), torch.zeros(96, 2))}))
    with pytest.raises(ValueError, match="do not fit"):
        slots.set(0, AdapterWeights("x", 2, {"layers.0.mlp.up_proj": (torch.zeros(2, 64), torch.zeros(96, 3))}))


def test_huge_weights_of_one_adapter_do_not_reach_tokens_of_another(world: World) -> None:
    slots = AdapterSlots(world.model, 2)
    slots.set(0, world.weights["all"])
    huge = {name: (a * 1e38, b) for name, (a, b) in world.weights["wide"].modules.items()}
    slots.set(1, AdapterWeights("huge", 16, huge))
    tokens = random_tokens(6, 5)
    paged = PagedModel(world.model, slots=slots)
    paged.add("good", tokens, 0)
    paged.add("bad", tokens, 1)
    paged.step({"good": 5, "bad": 5})
    paged.step({"good": 1, "bad": 1})
    assert not paged.logits("bad").isfinite().all()
    assert_true(world, paged, "good", "all", tokens)
