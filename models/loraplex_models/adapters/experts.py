"""LoRA on experts, as PEFT writes it: a pair for each linear of each expert, or one for all experts of a layer.

Adapters that were trained on transformers 4 have `….experts.3.w1.lora_A`. For the stacked parameters of transformers 5
(target_parameters) PEFT stores A of all experts one below the other, and in B the experts' columns of each rank side by
side: A [experts * rank, in], B [out, rank * experts]. Where gate_up_proj and down_proj both have such a pair, the one
of gate_up_proj has `base_layer` in its name; the shapes say which one a single pair belongs to.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from loraplex_models.adapters.lora_config import LoraConfig
from loraplex_models.adapters.pages import PAGE_ROWS, pages_for
from loraplex_models.adapters.refusal import ManifestError, shown
from loraplex_models.adapters.tensor_header import TensorEntry
from loraplex_models.adapters.tensor_names import ModuleNames
from loraplex_models.config import ExpertsConfig, ModelConfig

Place = Literal["gate", "up", "down", "gate_up"]


@dataclass(frozen=True, slots=True)
class ExpertEntry:
    """One pair of tensors: for one linear of one expert, or, where `expert` is None, of all experts of the layer."""

    layer: int
    place: Place
    expert: int | None
    a_name: str
    b_name: str
    rank: int  # of one expert
    scaling: float
    num_elements: int  # that it takes in rank pages


def expert_entry(
    name: str, module: ModuleNames, config: ModelConfig, lora: LoraConfig, tensors: Mapping[str, TensorEntry]
) -> ExpertEntry:
    """Check the pair of a module, `layers.0.mlp.experts.3.gate_proj`, `layers.0.mlp.experts` or with `.base_layer`.

    Raises ManifestError.
    """
    experts, layer, path = config.experts, int(name.split(".")[1]), name.partition(".experts")[2].strip(".")
    a_name, b_name = module.names["A"], module.names["B"]
    if experts is None or layer >= config.num_layers or layer in experts.dense_layers:
        raise _misfit(a_name, f"layer {layer} of the base model has no experts")
    if lora.features.use_dora or lora.features.block_diagonal is not None:
        raise ManifestError(f"tensor {shown(a_name)}: on experts only plain LoRA is served", "adapter_unsupported")
    a, b = tensors[a_name], tensors[b_name]
    if len(a.shape) != 2 or len(b.shape) != 2:
        raise ManifestError(f"tensor {shown(a_name)} or its B has not two dimensions")
    number, _, linear = path.partition(".")
    sizes = _sizes(config.hidden_size, experts)
    if linear:
        names: dict[str, Place] = {experts.names.gate: "gate", experts.names.up: "up", experts.names.down: "down"}
        if linear not in names or int(number) >= experts.num_experts:
            raise _misfit(a_name, f"the base model has {experts.num_experts} experts with {', '.join(names)}")
        place, expert, share, pattern_path = names[linear], int(number), 1, module.peft_path
        fits = (a.shape[1], b.shape[0]) == sizes[place]
    else:
        found: list[Place] = [each for each in ("gate_up", "down") if (a.shape[1], b.shape[0]) == sizes[each]]
        fits, place, expert, share = bool(found), found[0] if found else "down", None, experts.num_experts
        pattern_path = f"{module.peft_path.removesuffix('.base_layer')}.{place}_proj"
    rank = a.shape[0] // share
    if not fits or rank * share != a.shape[0] or a.shape[0] != b.shape[1]:
        raise _misfit(a_name, f"A {list(a.shape)} and B {list(b.shape)} fit none of its experts' linears")
    expected = lora.module_rank(pattern_path)
    if rank != expected:
        raise ManifestError(
            f"{name}: {shown(a_name)} has rank {rank}, adapter_config.json says {expected} (r and rank_pattern):"
            " config and weights are not of the same adapter"
        )
    scaling = lora.module_scaling(pattern_path, rank)
    # Gate and up have pages of their own, each with a copy of an A that they share.
    linears = (sizes["gate"], sizes["up"]) if place == "gate_up" else (sizes[place],)
    num_elements = share * pages_for(rank) * PAGE_ROWS * sum(map(sum, linears))
    return ExpertEntry(layer, place, expert, a_name, b_name, rank, scaling, num_elements)


def _sizes(hidden: int, experts: ExpertsConfig) -> dict[Place, tuple[int, int]]:
    inner = experts.inner_size
    return {"gate": (hidden, inner), "up": (hidden, inner), "gate_up": (hidden, 2 * inner), "down": (inner, hidden)}


def _misfit(tensor_name: str, reason: str) -> ManifestError:
    return ManifestError(f"tensor {shown(tensor_name)} does not fit: {reason}", "adapter_incompatible")
