"""The names that trainers give to an adapter's tensors, brought to the one name that is served."""

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Literal

from loraplex_models.adapters.refusal import ManifestError, shown, shown_names

# Wrappers of training libraries leave a segment of their own anywhere in the path.
WRAPPER_SEGMENTS = frozenset(("_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"))

LORA_TENSOR = re.compile(r"(?P<path>.+)\.lora_(?P<matrix>[AB])(?:\.(?P<adapter>[^.]+))?\.weight")
SERVED_PATH = re.compile(
    r"(?P<prefix>(?:model\.)?(?:language_model\.)?(?:model\.)?)"
    r"(?P<module>layers\.(?:0|[1-9]\d{0,5})\.(?P<kind>(?:self_attn|mlp)\.[a-z_]+))"
)
PEFT_PREFIX = "base_model.model."
CANONICAL_PREFIX = "model."

# Tensors of features that are not served: a pattern found in the name, and what to say.
UNSERVED_TENSORS: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"lora_embedding_[AB]"), "LoRA on embeddings is not served: leave embed_tokens out of target_modules"),
    (re.compile(r"lora_magnitude_vector"), "DoRA is not served: train with use_dora false"),
    (re.compile(r"lora_B(\.[^.]+)?\.bias$"), "a bias of lora_B is not served: train with lora_bias false"),
    (re.compile(r"lora_E|ranknum"), "AdaLoRA is not served: convert the adapter to LoRA first"),
    (re.compile(r"lora_diag"), "KaSA is not served"),
    (re.compile(r"trainable_tokens_(delta|original)"), "trained token rows are not served"),
    (re.compile(r"(^|\.)lm_head\.lora_[AB]"), "LoRA on lm_head is not served: leave it out of target_modules"),
    (re.compile(r"\.experts\."), "LoRA on experts is not served"),
    (re.compile(r"^lora_(unet|te\d?)_"), "this is an adapter of an image model"),
    (re.compile(r"adapter\.linear_(in|out)|linear_qkv"), "this is a NeMo adapter: export it in the PEFT format"),
    (re.compile(r"\.attn\.[a-z_]+\.lora_[ab]\."), "this is a torchtune checkpoint: export it in the PEFT format"),
    (re.compile(r"\.lora_[ab]$"), "this is an MLX adapter: convert it to the PEFT format"),
    (re.compile(r"modules_to_save|(^|\.)(lm_head|embed_tokens|score|classifier)\.weight$"),
     "full copies of modules are not served: train with modules_to_save null"),
    (re.compile(r"\.bias$"), "trained biases of the base are not served: train with bias 'none'"),
    (re.compile(r"(^|[._])(hada|lokr|vera|ia3|oft|boft|hra|miss|bone|shira|hira|vblora|randlora|c3a|fourierft|waveft"
                r"|delora|gralora|road|prompt_embeddings|adaption)([._]|$)"),
     "these are tensors of another method than LoRA"),
)  # fmt: skip

# State that some methods save beside A and B and that plain inference does not read.
IGNORED_TENSOR = re.compile(r"lora_velora_|lora_monteclora_sampler|(^|\.)original_module\.")
BASE_COPY = re.compile(r"(^|\.)(embed_tokens|lm_head)\.base_layer\.(weight|bias)$")


@dataclass(frozen=True, slots=True)
class LoraPair:
    """The two tensors of one module, by their names in the file; `peft_path` is what PEFT's patterns are matched to."""

    peft_path: str
    a_name: str
    b_name: str


@dataclass(frozen=True, slots=True)
class SortedNames:
    """All of a file's tensor names: the pairs by served module name, those of no known module, and the notes."""

    pairs: dict[str, LoraPair]
    unmatched: list[str]
    base_copies: list[str]
    warnings: list[str]


def _without_wrappers(name: str) -> str:
    return ".".join(segment for segment in name.split(".") if segment not in WRAPPER_SEGMENTS)


def _check_unserved(names: list[str]) -> None:
    for pattern, problem in UNSERVED_TENSORS:
        found = [name for name in names if pattern.search(name)]
        if found:
            raise ManifestError(f"tensors {shown_names(found, 3)}: {problem}", "adapter_unsupported")


def _pairs(matrices: dict[str, dict[Literal["A", "B"], tuple[str, str]]]) -> dict[str, LoraPair]:
    pairs = {}
    for module, found in matrices.items():
        if len(found) < 2:
            ((present, (_, name)),) = found.items()
            missing = "B" if present == "A" else "A"
            raise ManifestError(f"tensor {shown(name)} has no lora_{missing} beside it: save the adapter again")
        path, a_name = found["A"]
        pairs[module] = LoraPair(path, a_name, found["B"][1])
    return pairs


def sort_names(names: Iterable[str], kinds: Collection[str]) -> SortedNames:
    """Find the pairs of modules of the served kinds (`self_attn.q_proj`, …) among a file's tensor names.

    Raises ManifestError for names of features that are not served, halves of pairs and two tensors for one place.
    """
    matrices: dict[str, dict[Literal["A", "B"], tuple[str, str]]] = {}
    others, base_copies, forms = [], [], set()
    for name in names:
        bare = _without_wrappers(name)
        path = bare.removeprefix(PEFT_PREFIX)
        lora = LORA_TENSOR.fullmatch(path)
        served = SERVED_PATH.fullmatch(lora["path"]) if lora else None
        if lora is None or served is None or served["kind"] not in kinds:
            if BASE_COPY.search(bare):
                base_copies.append(name)
            elif not IGNORED_TENSOR.search(bare):
                others.append(name)
            continue
        if bare != name:
            forms.add("segments of training wrappers removed")
        if path == bare or served["prefix"] != CANONICAL_PREFIX:
            forms.add(f"prefix '{name[: name.index('layers.')]}' taken for '{PEFT_PREFIX}{CANONICAL_PREFIX}'")
        if lora["adapter"]:
            forms.add(f"adapter name {shown(lora['adapter'])} removed")
        matrix: Literal["A", "B"] = "A" if lora["matrix"] == "A" else "B"
        places = matrices.setdefault(served["module"], {})
        if matrix in places:
            raise ManifestError(f"tensors {shown(places[matrix][1])} and {shown(name)} are for the same module: "
                                "the file holds more than one adapter; save one")  # fmt: skip
        places[matrix] = (lora["path"], name)
    _check_unserved(others)
    warnings = [f"tensor names normalised: {form}" for form in sorted(forms)]
    return SortedNames(_pairs(matrices), others, base_copies, warnings)
