"""Merged adapters against peft's own merging, and in a batch beside their parts."""

import itertools
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import EngineBench
from peft import PeftModel
from peft.utils import merge_utils
from tiny_models import make_peft_adapter, make_tiny_llama
from transformers import LlamaForCausalLM
from truth import Truth

from loraplex_models.adapters.manifest import check_adapter
from loraplex_models.adapters.merge import merge_adapters, seed_of
from loraplex_models.adapters.merge_recipe import MergePart, MergeRecipe
from loraplex_models.adapters.refusal import ManifestError
from loraplex_models.adapters.weights import AdapterWeights, load_adapter_weights
from loraplex_models.config import read_config
from loraplex_server.messages import AdapterSpec

# Different ranks, scalings and modules: merging factors in place of deltas would show.
ADAPTERS: dict[str, dict[str, Any]] = {
    "one": {"rank": 4, "seed": 1},
    "two": {"rank": 12, "alpha": 5.0, "seed": 2, "use_rslora": True},
    "three": {"rank": 3, "seed": 3, "target_modules": ["q_proj", "down_proj"]},
}
WEIGHTS = (0.7, -0.4, 1.3)
STRATEGIES = ["linear", "ties", "dare_linear", "dare_ties"]


class World:
    def __init__(self, folder: Path):
        self.folder = folder / "base"
        self.model: LlamaForCausalLM = make_tiny_llama(self.folder)
        self.paths = {name: make_peft_adapter(folder / name, self.model, **how) for name, how in ADAPTERS.items()}
        config = read_config(self.folder)
        self.weights: dict[str, AdapterWeights] = {}
        for name, path in self.paths.items():
            manifest = check_adapter(path, config, max_rank=64)
            self.weights[name] = load_adapter_weights(path, manifest, dtype=torch.float32)

    def recipe(self, strategy: str, **how: Any) -> MergeRecipe:
        parts = tuple(
            MergePart(path=str(self.paths[name]), digest=self.weights[name].digest, weight=weight)
            for name, weight in zip(ADAPTERS, WEIGHTS, strict=True)
        )
        return MergeRecipe(parts=parts, strategy=strategy, **how)  # type: ignore[arg-type]

    def peft(self) -> PeftModel:
        model = LlamaForCausalLM.from_pretrained(self.folder)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of peft about its own use of transformers
            adapted = PeftModel.from_pretrained(model, str(self.paths["one"]), adapter_name="one")
            for name in ("two", "three"):
                adapted.load_adapter(str(self.paths[name]), adapter_name=name)
        return adapted

    def peft_deltas(self) -> dict[str, list[tuple[float, torch.Tensor]]]:
        """By module, the weight and the true delta of every adapter that changes it, as peft computes it."""
        found: dict[str, list[tuple[float, torch.Tensor]]] = {}
        for name, module in self.peft().named_modules():
            for adapter, weight in zip(ADAPTERS, WEIGHTS, strict=True):
                if adapter in getattr(module, "lora_A", {}):
                    short = name.removeprefix("base_model.model.model.")
                    found.setdefault(short, []).append((weight, module.get_delta_weight(adapter).detach()))
        return found


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("merge"))


def peft_merge(deltas: list[tuple[float, torch.Tensor]], recipe: MergeRecipe, seed: int) -> torch.Tensor:
    """What peft's functions make of true deltas."""
    weights, tensors = torch.tensor([weight for weight, _ in deltas]), [delta for _, delta in deltas]
    match recipe.strategy:
        case "linear":
            return merge_utils.task_arithmetic(tensors, weights)
        case "ties":
            return merge_utils.ties(tensors, weights, recipe.density, recipe.majority_sign)
        case "dare_linear":
            torch.manual_seed(seed)
            return merge_utils.dare_linear(tensors, weights, recipe.density)
        case "dare_ties":
            torch.manual_seed(seed)
            return merge_utils.dare_ties(tensors, weights, recipe.density, recipe.majority_sign)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("majority_sign", ["total", "frequency"])
@pytest.mark.parametrize("density", [0.3, 0.8])
def test_each_strategy_is_pefts_on_the_true_deltas(
    world: World, strategy: str, majority_sign: str, density: float
) -> None:
    recipe = world.recipe(strategy, density=density, majority_sign=majority_sign)
    merged = merge_adapters([world.weights[name] for name in ADAPTERS], recipe)
    truth = world.peft_deltas()
    assert merged.modules.keys() == truth.keys()
    for name, (a, b) in merged.modules.items():
        expected = peft_merge(truth[name], recipe, seed_of(recipe, name))
        assert (b @ a - expected).abs().max() < 1e-4, name


@pytest.mark.parametrize(("strategy", "combination"), [("linear", "cat"), ("ties", "ties_svd")])
def test_a_merge_is_what_add_weighted_adapter_gives(world: World, strategy: str, combination: str) -> None:
    """peft's `linear` and `ties` merge the factors, which is another thing; `cat` and `ties_svd` merge the deltas."""
    density = 0.5
    recipe = world.recipe(strategy, density=density)
    merged = merge_adapters([world.weights[name] for name in ADAPTERS], recipe)
    adapted = world.peft()
    how = {} if combination == "cat" else {"svd_rank": 64, "density": density, "majority_sign_method": "total"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted.add_weighted_adapter(list(ADAPTERS), list(WEIGHTS), "merged", combination_type=combination, **how)
    # Of the 64 x 64 matrices, whose 64 singular values keep all.
    module = adapted.get_submodule("base_model.model.model.layers.1.self_attn.q_proj")
    a, b = merged.modules["layers.1.self_attn.q_proj"]
    assert (b @ a - module.get_delta_weight("merged")).abs().max() < 1e-4


def test_a_recipe_draws_the_same_every_time_and_others_draw_otherwise(world: World) -> None:
    parts = [world.weights[name] for name in ADAPTERS]
    name = "layers.0.mlp.down_proj"
    first, again, other = (
        merge_adapters(parts, world.recipe("dare_linear", density=density)).modules[name]
        for density in (0.5, 0.5, 0.500001)
    )
    assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))
    assert not torch.equal(first[1] @ first[0], other[1] @ other[0])


def test_recipes_that_differ_in_anything_have_digests_of_their_own(world: World) -> None:
    recipes = [world.recipe("linear"), world.recipe("linear", density=0.5)]
    recipes += [
        world.recipe(strategy, density=density, majority_sign=sign)
        for strategy, density, sign in itertools.product(STRATEGIES[1:], (0.5, 0.6), ("total", "frequency"))
    ]
    part = recipes[0].parts[0]
    for changed in (
        MergePart(path=part.path, digest="0" * 64, weight=part.weight),
        MergePart(path=part.path, digest=part.digest, weight=part.weight + 1e-9),
    ):
        recipes.append(MergeRecipe(parts=(changed, *recipes[0].parts[1:])))
    recipes.append(MergeRecipe(parts=recipes[0].parts[::-1]))
    digests = [recipe.digest for recipe in recipes]
    assert digests[0] == digests[1]  # a plain sum cuts nothing
    assert len({*digests}) == len(digests) - 1


def test_files_that_changed_since_the_recipe_was_made_are_refused(world: World) -> None:
    parts = [world.weights[name] for name in ("one", "three", "two")]
    with pytest.raises(ManifestError, match="have changed"):
        merge_adapters(parts, world.recipe("linear"))


def test_merges_answer_beside_their_parts_and_the_base(world: World, tmp_path: Path) -> None:
    bench = EngineBench(world.folder, world.paths)
    truths = {None: Truth(world.model, {})}
    for strategy in STRATEGIES:
        recipe = world.recipe(strategy, density=0.7)
        spec = AdapterSpec(adapter_id=strategy, digest=recipe.digest, path="", rank=64, num_bytes=1, merge=recipe)
        bench.specs[strategy] = spec
        model = LlamaForCausalLM.from_pretrained(world.folder)
        with torch.no_grad():
            for name, deltas in world.peft_deltas().items():
                weight = model.get_submodule(f"model.{name}").weight
                weight += peft_merge(deltas, recipe, seed_of(recipe, name))
        truths[strategy] = Truth(model, {})
    bench.start()
    prompts = {name: [7, 8, 9, 10 + i] for i, name in enumerate([None, *STRATEGIES])}
    for name, prompt in prompts.items():
        bench.add(str(name), prompt, name, ignore_eos=True)
    bench.add("part", [7, 8, 9], "two", ignore_eos=True)
    bench.run()
    for name, prompt in prompts.items():
        assert truths[name].objection(None, prompt, bench.answer(str(name)), set()) is None, name
    assert (
        Truth(LlamaForCausalLM.from_pretrained(world.folder), {"two": world.paths["two"]}).objection(
            "two", [7, 8, 9], bench.answer("part"), set()
        )
        is None
    )
