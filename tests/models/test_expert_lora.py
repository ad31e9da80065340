"""LoRA on experts in every form that PEFT writes, in mixed batches, against peft."""

import copy
import json
import random
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import EngineBench
from expert_adapters import BOTH, write_adapter
from paged_model import PagedModel, random_tokens, true_logits
from ranks import run_ranks
from safetensors.torch import load_file, save_file
from tiny_families import FAMILIES, make_tiny
from tiny_models import load_peft, unload_peft
from transformers import PreTrainedModel
from truth import Truth

from loraplex_models.adapters.cut import cut_adapter
from loraplex_models.adapters.manifest import ManifestError, check_adapter
from loraplex_models.adapters.slots import AdapterSlots
from loraplex_models.adapters.weights import load_adapter_weights
from loraplex_models.config import read_config
from loraplex_models.cuts import RankPart
from loraplex_models.loader import load_model
from loraplex_models.parallel import ParallelGroup

TOLERANCE = 5e-4
EXPERT_LINEARS = {"Qwen3-MoE": ("gate_proj", "up_proj", "down_proj"), "Mixtral": ("w1", "w3", "w2")}
BLOCKS = {"Qwen3-MoE": "mlp", "Mixtral": "block_sparse_moe"}


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of peft about names that it brings to those of transformers 5
        yield


def write_older_adapter(folder: Path, model: PreTrainedModel, name: str) -> Path:
    """As peft wrote it for transformers 4, where each linear of each expert was a module."""
    write_adapter(folder, model, target_modules=["q_proj"])
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    config["target_modules"] = ["q_proj", "gate", *EXPERT_LINEARS[name]]
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    tensors = load_file(folder / "adapter_model.safetensors")
    experts = read_config(folder.parent / "model").experts
    assert experts is not None
    generator = torch.Generator().manual_seed(5)
    for layer in range(3):
        path = f"base_model.model.model.layers.{layer}.{BLOCKS[name]}.gate"
        tensors[f"{path}.lora_A.weight"] = torch.randn(4, 64, generator=generator) * 0.3
        tensors[f"{path}.lora_B.weight"] = torch.randn(experts.num_experts, 4, generator=generator) * 0.15
        for expert in range(experts.num_experts):
            for linear, (in_size, out_size) in zip(
                EXPERT_LINEARS[name],
                ((64, experts.inner_size), (64, experts.inner_size), (experts.inner_size, 64)),
                strict=True,
            ):
                path = f"base_model.model.model.layers.{layer}.{BLOCKS[name]}.experts.{expert}.{linear}"
                tensors[f"{path}.lora_A.weight"] = torch.randn(4, in_size, generator=generator) * 0.3
                tensors[f"{path}.lora_B.weight"] = torch.randn(out_size, 4, generator=generator) * 0.15
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


@pytest.fixture(scope="module", params=EXPERT_LINEARS)
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[PreTrainedModel, Path]:
    folder = tmp_path_factory.mktemp("experts")
    name = request.param
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = make_tiny(FAMILIES[name], folder / "model")
        patterns = {"rank_pattern": {BOTH[1]: 2}, "alpha_pattern": {BOTH[0]: 3}}
        write_adapter(folder / "parameters", model, target_modules=["q_proj"], target_parameters=BOTH, **patterns)
        patterns = {"rank_pattern": {"mlp.gate.weight": 3}, "alpha_pattern": {"mlp.gate": 40, ".*gate.weight": 5}}
        write_adapter(folder / "router", model, target_modules=[], target_parameters=["mlp.gate.weight"], **patterns)
        write_adapter(folder / "all", model, target_modules=["q_proj", "gate", *EXPERT_LINEARS[name]])
        write_adapter(folder / "gate-up", model, target_modules=["v_proj"], target_parameters=BOTH[:1], use_rslora=True)
        write_adapter(folder / "down", model, target_modules=[], target_parameters=BOTH[1:], r=3)
        write_adapter(folder / "modules", model, target_modules=["o_proj", *EXPERT_LINEARS[name]])
        write_older_adapter(folder / "older", model, name)
    return model, folder


FORMS = ("parameters", "gate-up", "down", "modules", "older", "router", "all")


SEQUENCES = {f"s{i}": random_tokens(length, seed=i) for i, length in enumerate((45, 33, 1, 60, 18, 41, 25, 70, 9))}
SLOTS = {name: i % (len(FORMS) + 1) - 1 for i, name in enumerate(SEQUENCES)}


@pytest.fixture(scope="module")
def truth(world: tuple[PreTrainedModel, Path]) -> dict[str, torch.Tensor]:
    """What transformers and peft give for each sequence, alone."""
    model, folder = world
    base = {name: true_logits(model, tokens) for name, tokens in SEQUENCES.items()}
    found = dict(base)
    for slot, form in enumerate(FORMS):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            adapted = load_peft(folder / form, model)
        for name in (name for name in SEQUENCES if SLOTS[name] == slot):
            found[name] = true_logits(adapted, SEQUENCES[name])
            assert (base[name] - found[name]).abs().max() > 0.05, f"{form} is too weak to tell"
        unload_peft(adapted)
    return found


def mixed_batches(folder: Path, group: ParallelGroup) -> dict[str, torch.Tensor]:
    """The same by one of the ranks, in steps of any mix of decodes and chunks."""
    ours = load_model(folder / "model", dtype=torch.float32, device=torch.device("cpu"), group=group)
    config = read_config(folder / "model")
    slots = AdapterSlots(ours, len(FORMS) + 1)
    for slot, form in enumerate(FORMS):
        manifest = check_adapter(folder / form, config, max_rank=8)
        weights = load_adapter_weights(folder / form, manifest, dtype=torch.float32)
        slots.set(slot, cut_adapter(weights, RankPart(config, group.rank, group.size)))
    paged = PagedModel(ours, num_blocks=512, slots=slots)
    draw = random.Random(3)
    for name, tokens in SEQUENCES.items():
        paged.add(name, tokens, SLOTS[name])
    while waiting := [name for name in SEQUENCES if paged.remaining(name)]:
        chosen = draw.sample(waiting, draw.randint(1, len(waiting)))
        paged.step({name: min(draw.choice((1, 2, 7, 60)), paged.remaining(name)) for name in chosen})
    return {name: paged.logits(name) for name in SEQUENCES}


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_mixed_batches_equal_peft(
    num_ranks: int, world: tuple[PreTrainedModel, Path], truth: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    _, folder = world
    for found in run_ranks(num_ranks, tmp_path, lambda group: mixed_batches(folder, group)):
        for name, expected in truth.items():
            assert (found[name] - expected).abs().max() < TOLERANCE, (name, SLOTS[name])


def test_a_slot_that_is_used_again_keeps_nothing_of_the_adapter_before(world: tuple[PreTrainedModel, Path]) -> None:
    _, folder = world
    ours = load_model(folder / "model", dtype=torch.float32, device=torch.device("cpu"), group=ParallelGroup.single())
    slots, alone = AdapterSlots(ours, 1), AdapterSlots(ours, 1)
    tokens = random_tokens(20, seed=1)

    def put(where: AdapterSlots, form: str) -> None:
        manifest = check_adapter(folder / form, read_config(folder / "model"), max_rank=8)
        where.set(0, load_adapter_weights(folder / form, manifest, dtype=torch.float32))

    put(slots, "modules")
    put(slots, "down")
    put(alone, "down")
    found = []
    for each in (slots, alone):
        paged = PagedModel(ours, slots=each)
        paged.add("a", tokens, 0)
        found.append(paged.run_alone("a", 20))
    assert torch.equal(found[0], found[1])


def test_the_engine_answers_as_peft_does(world: tuple[PreTrainedModel, Path]) -> None:
    model, folder = world
    adapters = {form: folder / form for form in ("parameters", "older")}
    bench = EngineBench(folder / "model", adapters)
    prompts = {None: [5, 9, 13, 200], "parameters": [7, 301, 44], "older": [400, 3, 3, 8, 90]}
    for adapter, prompt in prompts.items():
        bench.add(str(adapter), prompt, adapter)
    bench.run()
    assert Truth(model, {}).objection(None, prompts[None], bench.answer("None"), {2}) is None
    for adapter in adapters:
        adapted = load_peft(folder / adapter, model)
        answer = bench.answer(adapter).token_ids
        logits = true_logits(adapted, prompts[adapter] + answer)
        unload_peft(adapted)
        assert logits[len(prompts[adapter]) - 1 : -1].argmax(-1).tolist() == answer


def damaged(folder: Path, to: Path, change: Any) -> Path:
    shutil.copytree(folder, to)
    tensors = load_file(to / "adapter_model.safetensors")
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, to / "adapter_model.safetensors")
    return to


PREFIX = "base_model.model.model.layers.0.mlp.experts"


def test_pairs_that_fit_no_expert_are_refused(world: tuple[PreTrainedModel, Path], tmp_path: Path) -> None:
    _, folder = world

    def narrow(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{PREFIX}.lora_A.weight"] = tensors[f"{PREFIX}.lora_A.weight"][:, :-1]

    def lose(tensors: dict[str, torch.Tensor]) -> None:
        del tensors[f"{PREFIX}.lora_B.weight"]

    def too_many(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{PREFIX}.99.gate_proj.lora_A.weight"] = torch.ones(4, 64)
        tensors[f"{PREFIX}.99.gate_proj.lora_B.weight"] = torch.ones(40, 4)

    for number, (change, message) in enumerate(
        ((narrow, "fit none of its experts"), (lose, "has no lora_B"), (too_many, "base model has . experts"))
    ):
        adapter = damaged(folder / "parameters", tmp_path / str(number), change)
        with pytest.raises(ManifestError, match=message):
            check_adapter(adapter, read_config(folder / "model"), max_rank=64)


def test_a_router_that_was_a_linear_when_dora_was_trained_on_it(
    world: tuple[PreTrainedModel, Path], tmp_path: Path
) -> None:
    """peft on transformers 5 cannot load it; its formula for linears gives the router's weight."""
    model, folder = world
    truth = copy.deepcopy(model)
    (block,) = (block for name, block in BLOCKS.items() if name.partition("-")[0] in type(model).__name__)
    generator, tensors = torch.Generator().manual_seed(8), {}
    for number, layer in enumerate(truth.model.layers):
        weight = layer.mlp.gate.weight
        a, b = torch.randn(3, 64, generator=generator) * 0.3, torch.randn(len(weight), 3, generator=generator) * 0.15
        magnitude = torch.rand(len(weight), generator=generator) + 0.5
        names = ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")
        for name, tensor in zip(names, (a, b, magnitude), strict=True):
            tensors[f"base_model.model.model.layers.{number}.{block}.gate.{name}"] = tensor
        with torch.no_grad():
            changed = weight + 5 / 3 * b @ a
            weight.copy_(magnitude.unsqueeze(1) * changed / changed.norm(dim=1, keepdim=True))
    config = {"peft_type": "LORA", "r": 3, "alpha_pattern": {"gate": 5}, "use_dora": True, "target_modules": ["gate"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    ours = load_model(folder / "model", dtype=torch.float32, device=torch.device("cpu"), group=ParallelGroup.single())
    slots = AdapterSlots(ours, 1)
    manifest = check_adapter(tmp_path, ours.config, max_rank=8)
    slots.set(0, load_adapter_weights(tmp_path, manifest, dtype=torch.float32))
    paged = PagedModel(ours, slots=slots)
    tokens = random_tokens(30, seed=4)
    paged.add("a", tokens, 0)
    expected = true_logits(truth, tokens)
    assert (paged.run_alone("a", 9) - expected).abs().max() < TOLERANCE
    assert (true_logits(model, tokens) - expected).abs().max() > 0.05, "the adapter is too weak to tell"


def test_a_router_of_a_layer_without_experts_is_refused(tmp_path: Path) -> None:
    reference = make_tiny(FAMILIES["Qwen3-MoE, one layer dense"], tmp_path / "model")
    adapter = write_adapter(tmp_path / "a", reference, target_modules=[], target_parameters=["mlp.gate.weight"])

    def misplace(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if ".layers.0." in name]:
            tensors[name.replace(".layers.0.", ".layers.1.")] = tensors[name].clone()

    config = read_config(tmp_path / "model")
    assert set(check_adapter(adapter, config, max_rank=8).modules) == {f"layers.{layer}.mlp.gate" for layer in (0, 2)}
    with pytest.raises(ManifestError, match=r"layers\.1\.mlp\.gate.* is for a router, layer 1 .* has a plain MLP"):
        check_adapter(damaged(adapter, tmp_path / "b", misplace), config, max_rank=8)


def test_target_parameters_that_are_no_list_are_refused(world: tuple[PreTrainedModel, Path], tmp_path: Path) -> None:
    _, folder = world
    adapter = shutil.copytree(folder / "router", tmp_path / "a")
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"target_parameters": "mlp.gate.weight"}))
    with pytest.raises(ManifestError, match=r"target_parameters is 'mlp\.gate\.weight': it must be a list of names"):
        check_adapter(adapter, read_config(folder / "model"), max_rank=8)


def test_a_rank_beyond_the_servers_is_refused(world: tuple[PreTrainedModel, Path]) -> None:
    _, folder = world
    with pytest.raises(ManifestError, match=r"rank 8 .* is greater than max_lora_rank 7"):
        check_adapter(folder / "modules", read_config(folder / "model"), max_rank=7)
