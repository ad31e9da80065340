"""The names that trainers give to an adapter's tensors, brought to the one name that is served."""

import re
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Literal

from loraplex_models.adapters.refusal import CONVERT_COMMAND, ManifestError, shown, shown_names

# Wrappers of training libraries leave a segment of their own anywhere in the path.
WRAPPER_SEGMENTS = frozenset(("_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"))

# What a tensor is to its module, and how its name ends; an adapter's own name may stand between.
Role = Literal["A", "B", "B bias", "magnitude", "full copy", "rows", "bias", "base copy"]
_NAME = r"(?:\.(?P<adapter>[^.]+))?"
ROLES: tuple[tuple[Role, re.Pattern[str]], ...] = (
    ("A", re.compile(rf"(?P<path>.+)\.lora_A{_NAME}\.weight")),
    ("B", re.compile(rf"(?P<path>.+)\.lora_B{_NAME}\.weight")),
    ("A", re.compile(rf"(?P<path>.+)\.lora_embedding_A{_NAME}")),
    ("B", re.compile(rf"(?P<path>.+)\.lora_embedding_B{_NAME}")),
    ("B bias", re.compile(rf"(?P<path>.+)\.lora_B{_NAME}\.bias")),
    ("magnitude", re.compile(r"(?P<path>.+)\.lora_magnitude_vector(?:\.(?P<adapter>(?!weight$)[^.]+))?(?:\.weight)?")),
    ("rows", re.compile(rf"(?P<path>.+?)(?:\.token_adapter)?\.trainable_tokens_delta{_NAME}")),
    ("full copy", re.compile(rf"(?P<path>.+)\.modules_to_save{_NAME}\.weight")),
    ("base copy", re.compile(r"(?P<path>.+)\.base_layer\.(?P<adapter>)weight")),
    ("full copy", re.compile(r"(?P<path>.+)\.(?P<adapter>)weight")),
    ("bias", re.compile(r"(?P<path>.+?)(?:\.base_layer)?\.(?P<adapter>)bias")),
)
LINEAR_ROLES = frozenset(("A", "B", "B bias", "magnitude", "bias"))
END_ROLES = frozenset(("A", "B", "B bias", "magnitude", "full copy", "rows", "base copy", "bias"))
SERVED_PATH = re.compile(
    r"(?P<prefix>(?:model\.)?(?:language_model\.)?(?:model\.)?)"
    r"(?P<module>layers\.(?:0|[1-9]\d{0,5})\.(?P<kind>(?:self_attn|mlp)\.[a-z0-9_]+))"
)
END_PATH = re.compile(r"(?P<prefix>(?:model\.)?(?:language_model\.)?(?:model\.)?)(?P<module>embed_tokens|lm_head)")
EXPERT_PATH = re.compile(
    r"(?P<prefix>(?:model\.)?(?:language_model\.)?(?:model\.)?)"
    r"(?P<module>layers\.(?:0|[1-9]\d{0,5})\.mlp\.experts"
    r"(?:\.(?:0|[1-9]\d{0,4})\.[a-z_]+\d?|\.base_layer)?)"
)
PEFT_PREFIX = "base_model.model."
CANONICAL_PREFIX = "model."

# Tensors of features that are not served: a pattern found in the name, and what to say.
UNSERVED_TENSORS: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"lora_E|ranknum"), f"AdaLoRA is not served: convert it with `{CONVERT_COMMAND}`"),
    (re.compile(r"lora_diag"), "KaSA is not served"),
    (re.compile(r"\.experts\."), "LoRA on experts is served of pairs A and B, and on base models with experts, only"),
    (re.compile(r"^lora_(unet|te\d?)_"), "this is an adapter of an image model"),
    (re.compile(r"adapter\.linear_(in|out)|linear_qkv"), "this is a NeMo adapter: export it in the PEFT format"),
    (re.compile(r"\.attn\.[a-z_]+\.lora_[ab]\."), "this is a torchtune checkpoint: export it in the PEFT format"),
    (re.compile(r"\.lora_[ab]$"), f"this is an MLX adapter: convert it with `{CONVERT_COMMAND}`"),
    (re.compile(r"modules_to_save|(^|\.)(score|classifier)\.weight$"),
     "full copies are served of embed_tokens and lm_head only: train without modules_to_save"),
    (re.compile(r"trainable_tokens_(delta|original)"), "token rows are served of embed_tokens and lm_head only"),
    (re.compile(r"lora_magnitude_vector|lora_B(\.[^.]+)?\.bias$"),
     "parts of modules that the base model does not have"),
    (re.compile(r"\.bias$"), "trained biases are served of the layers' linears only: train with bias 'lora_only'"),
    (re.compile(r"(^|[._])(hada|lokr|vera|ia3|oft|boft|hra|miss|bone|shira|hira|vblora|randlora|c3a|fourierft|waveft"
                r"|delora|gralora|road|prompt_embeddings|adaption)([._]|$)"),
     "these are tensors of another method than LoRA"),
)  # fmt: skip

# The kind of modules that stands for all linears of experts.
EXPERTS = "experts"

# State that some methods save beside A and B and that plain inference does not read.
IGNORED_TENSOR = re.compile(r"lora_velora_|lora_monteclora_sampler|(^|\.)original_module\.|trainable_tokens_original")


@dataclass(frozen=True, slots=True)
class ModuleNames:
    """The tensors of one module, by role; `peft_path` is what PEFT's patterns are matched to."""

    peft_path: str
    names: dict[Role, str]


@dataclass(frozen=True, slots=True)
class SortedNames:
    """All of a file's tensor names: by served module, those of no known module, and the notes."""

    modules: dict[str, ModuleNames]
    unmatched: list[str]
    warnings: list[str]


def _without_wrappers(name: str) -> str:
    return ".".join(segment for segment in name.split(".") if segment not in WRAPPER_SEGMENTS)


def _check_unserved(names: list[str]) -> None:
    for pattern, problem in UNSERVED_TENSORS:
        found = [name for name in names if pattern.search(name)]
        if found:
            raise ManifestError(f"tensors {shown_names(found, 3)}: {problem}", "adapter_unsupported")


def _check_pairs(modules: dict[str, ModuleNames]) -> None:
    for module in modules.values():
        names = module.names
        for present, missing in (("A", "B"), ("B", "A"), ("B bias", "B"), ("magnitude", "A")):
            if present in names and missing not in names:
                raise ManifestError(
                    f"tensor {shown(names[present])} has no lora_{missing} beside it: save the adapter again"
                )


def _find(
    path: str, kinds: Collection[str], served_name: Callable[[str], str]
) -> tuple[re.Match[str], re.Match[str], Role] | None:
    """How a name ends, whose module it names and as what; None where it is of no served module."""
    for role, pattern in ROLES:
        ending = pattern.fullmatch(path)
        if ending is None:
            continue
        module = served_name(ending["path"])
        if (linear := SERVED_PATH.fullmatch(module)) and linear["kind"] in kinds:
            return (ending, linear, role) if role in LINEAR_ROLES else None
        if EXPERTS in kinds and role in ("A", "B") and (expert := EXPERT_PATH.fullmatch(module)):
            return ending, expert, role
        if end := END_PATH.fullmatch(module):
            return (ending, end, role) if role in END_ROLES else None
    return None


def sort_names(names: Iterable[str], kinds: Collection[str], served_name: Callable[[str], str] = str) -> SortedNames:
    """Find the tensors of linears of the served kinds (`self_attn.q_proj`, …), the embedding and the head.

    `served_name` is that of `served_names`.
    Raises ManifestError for names of features that are not served, halves of pairs and two tensors for one place.
    """
    modules: dict[str, ModuleNames] = {}
    others, forms = [], set()
    for name in names:
        bare = _without_wrappers(name)
        if IGNORED_TENSOR.search(bare):
            continue
        path = bare.removeprefix(PEFT_PREFIX)
        found = _find(path, kinds, served_name)
        if found is None:
            others.append(name)
            continue
        ending, place, role = found
        if bare != name:
            forms.add("segments of training wrappers removed")
        if path == bare or place["prefix"] != ("" if place["module"] == "lm_head" else CANONICAL_PREFIX):
            canonical = "" if place["module"] == "lm_head" else CANONICAL_PREFIX
            seen = name[: max(name.find(place["module"].partition(".")[0]), 0)]
            forms.add(f"prefix '{seen}' taken for '{PEFT_PREFIX}{canonical}'")
        if ending["adapter"]:
            forms.add(f"adapter name {shown(ending['adapter'])} removed")
        module = modules.setdefault(place["module"], ModuleNames(ending["path"], {}))
        if role in module.names:
            raise ManifestError(f"tensors {shown(module.names[role])} and {shown(name)} are for the same module: "
                                "the file holds more than one adapter; save one")  # fmt: skip
        module.names[role] = name
    _check_unserved(others)
    _check_pairs(modules)
    return SortedNames(modules, others, [f"tensor names normalised: {form}" for form in sorted(forms)])
