"""`LoraConfig`: what adapter_config.json says, every field that changes the output honoured or refused."""

import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from loraplex_models.adapters.lora_features import CONFIG_FILE as CONFIG_FILE
from loraplex_models.adapters.lora_features import LoraFeatures, flag, parse_features, refuse
from loraplex_models.adapters.refusal import CONVERT_COMMAND, ManifestError, shown, shown_names

DEFAULT_RANK = 8  # PEFT's defaults, for files that leave the fields out
DEFAULT_ALPHA = 8

# Patterns are somebody else's regular expressions. Plain names are cheap; others are held to what cannot take long.
MAX_PATTERNS = 8192
MAX_REGEX_PATTERNS = 32
MAX_PATTERN_CHARACTERS = 512
MAX_QUANTIFIERS = 3

SAVE_WITHOUT = "train and save the adapter without it"

# Fields that change the output and are not served: with any value but these, the adapter is refused.
UNSERVED_FIELDS: dict[str, tuple[tuple[Any, ...], str]] = {
    "use_qalora": ((None, False), f"QA-LoRA is not served: {SAVE_WITHOUT}"),
    "kasa_config": ((None,), f"KaSA changes the base weights and is not served: {SAVE_WITHOUT}"),
    "arrow_config": ((None,), "Arrow's routing over adapters is not served: serve the adapters one by one"),
    "layer_replication": ((None, []), "repeated base layers are not served: merge the adapter into its base"),
    "target_parameters": ((None, []), "LoRA on raw parameters is served on those of experts only: use target_modules"),
}

# Fields that `lora_features` reads.
FEATURE_FIELDS = frozenset((
    "use_dora", "lora_bias", "bias", "modules_to_save", "use_bdlora", "alora_invocation_tokens",
    "trainable_token_indices", "ensure_weight_tying",
))  # fmt: skip

# Fields without effect on what is served here: about training, about the file, or decided by the tensors' names.
HARMLESS_FIELDS = frozenset((
    "auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "peft_version", "lora_dropout",
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "fan_in_fan_out", "loftq_config",
    "eva_config", "corda_config", "lora_ga_config", "velora_config", "monteclora_config", "megatron_config",
    "megatron_core", "runtime_config", "qalora_group_size", "peft_type", "task_type", "r", "lora_alpha", "use_rslora",
    "rank_pattern", "alpha_pattern", "init_lora_weights",
))  # fmt: skip

PLAIN_INITS = (None, True, False, "gaussian", "eva", "orthogonal", "mica", "lora_ga")
CHANGED_BASE_INIT = re.compile(r"(?:pissa(?:_niter_\d+)?|olora|corda|loftq)")

CONVERTIBLE_METHODS = frozenset((
    "VERA", "PVERA", "MISS", "BONE", "LOHA", "LOKR", "RANDLORA", "C3A", "FOURIERFT", "WAVEFT", "DELORA",
    "GRALORA", "VBLORA", "UNILORA", "TINYLORA", "PSOFT",
))  # fmt: skip
TRAINABLE_TOKENS_FIELDS = frozenset(("peft_type", "target_modules", "token_indices", "init_weights"))
HEAD_TASKS = ("SEQ_CLS", "TOKEN_CLS", "FEATURE_EXTRACTION", "QUESTION_ANS")


@dataclass(frozen=True, slots=True)
class Patterns:
    """PEFT's per-module values: the first key, in the file's order, that matches a module's name gives its value."""

    values: tuple[tuple[re.Pattern[str], str, float], ...]  # compiled key, text each match ends with, value

    def value(self, module_name: str) -> float | None:
        """The value of a module, None where no key matches. The name is the path below base_model.model."""
        for pattern, ending, value in self.values:
            if module_name.endswith(ending) and pattern.match(module_name):
                return value
        return None


@dataclass(frozen=True, slots=True)
class LoraConfig:
    """The fields of adapter_config.json that decide ranks and scalings, and the names to compare."""

    rank: int
    alpha: float
    use_rslora: bool
    rank_pattern: Patterns
    alpha_pattern: Patterns
    target_modules: tuple[str, ...] | None  # None: not a list of names
    target_parameters: frozenset[str]
    base_model_name: str | None
    features: LoraFeatures
    warnings: tuple[str, ...]

    def pattern_path(self, module_name: str) -> str:
        """What PEFT matches patterns to: a module's name, or that of its weight where the config targets this."""
        words = (*module_name.split("."), "weight")
        endings = {".".join(words[start:]) for start in range(len(words))}
        return module_name if self.target_parameters.isdisjoint(endings) else f"{module_name}.weight"

    def module_rank(self, module_name: str) -> int:
        """The rank that PEFT gives this module."""
        return int(self.rank_pattern.value(module_name) or self.rank)

    def module_scaling(self, module_name: str, rank: int) -> float:
        """The factor of B·A for this module."""
        alpha = self.alpha_pattern.value(module_name)
        return (self.alpha if alpha is None else alpha) / (math.sqrt(rank) if self.use_rslora else rank)


def _rank(field: str, value: Any) -> int:
    if type(value) is not int or value < 1:
        refuse(field, value, "a rank is an integer of at least 1")
    return value


def _alpha(field: str, value: Any) -> float:
    if type(value) not in (int, float):
        refuse(field, value, "an alpha is a number")
    try:
        alpha = float(value)
    except OverflowError:
        alpha = math.inf
    if not math.isfinite(alpha):
        refuse(field, value, "an alpha is a finite number")
    return alpha


def _compile(field: str, key: str) -> tuple[re.Pattern[str], str]:
    """A pattern's regular expression as PEFT builds it, and the ending that every match must have."""
    if len(key) > MAX_PATTERN_CHARACTERS:
        refuse(field, key, f"a pattern has at most {MAX_PATTERN_CHARACTERS} characters")
    is_name = re.fullmatch(r"[\w.]*", key) is not None
    if not is_name:
        # Backtracking explodes where a repeated group repeats, and grows with the number of repeats. Groups with
        # extensions are left out because they could hide either from this look at the text.
        bare = re.sub(r"\\.|\[\^?\]?[^\]]*\]", "x", key, flags=re.DOTALL).replace("(?:", "(")
        if re.search(r"\)[*+{]|\(\?", bare) or len(re.findall(r"[*+?{]", bare)) > MAX_QUANTIFIERS:
            fix = f"use names, or at most {MAX_QUANTIFIERS} quantifiers, none on a group, and no (?…) but (?:…)"
            refuse(field, key, f"such a pattern can take very long: {fix}", "adapter_unsupported")
    try:
        pattern = re.compile(rf"(.*\.)?({key})$")
    except (re.error, OverflowError, RecursionError) as error:
        refuse(field, key, f"not a regular expression ({error})")
    return pattern, key.rpartition(".")[2] if is_name else ""


def _patterns(raw: dict[str, Any], field: str, kind: Literal["rank", "alpha"]) -> Patterns:
    value = raw.get(field) or {}
    if not isinstance(value, dict):
        refuse(field, value, "it must be an object of module names and values")
    if len(value) > MAX_PATTERNS:
        raise ManifestError(f"{CONFIG_FILE}: {field} has {len(value)} patterns, at most {MAX_PATTERNS} are served")
    check = _rank if kind == "rank" else _alpha
    patterns = tuple(
        (*_compile(field, key), float(check(f"{field}[{shown(key)}]", item))) for key, item in value.items()
    )
    if sum(not ending for _, ending, _ in patterns) > MAX_REGEX_PATTERNS:
        fix = f"at most {MAX_REGEX_PATTERNS} are served beside plain names"
        raise ManifestError(f"{CONFIG_FILE}: {field} has too many regular expressions: {fix}", "adapter_unsupported")
    return Patterns(patterns)


def _check_method(raw: dict[str, Any], tensor_names: Iterable[str]) -> list[str]:
    method = raw.get("peft_type")
    if method is None:
        if not any(".lora_A" in name for name in tensor_names):
            refuse("peft_type", method, "no LoRA tensors either: this is not a LoRA adapter", "adapter_unsupported")
        return [f"{CONFIG_FILE} has no peft_type; taken for LORA by its tensors"]
    if not isinstance(method, str):
        refuse("peft_type", method, "it must be the name of a method")
    if method.upper() == "LORA":
        return []
    if method.upper() == "ADALORA":
        fix = f"only LORA is served; convert it with `{CONVERT_COMMAND}`"
    elif method.upper() in CONVERTIBLE_METHODS:
        fix = "only LORA is served; convert it: peft.save_as_lora(NEW_FOLDER, PeftModel.from_pretrained(…), rank=…)"
    else:
        fix = "only LORA is served, and this method cannot be turned into it"
    refuse("peft_type", method, fix, "adapter_unsupported")


def _as_lora(raw: dict[str, Any], tensor_names: Iterable[str]) -> dict[str, Any]:
    """PEFT's method of trained token rows alone, said in the fields of LoRA: its ids are those of every rows tensor."""
    if str(raw.get("peft_type")).upper() != "TRAINABLE_TOKENS":
        return raw
    modules = [name.partition(".trainable_tokens_delta")[0] for name in tensor_names if "trainable_tokens_" in name]
    others = {name: value for name, value in raw.items() if name not in TRAINABLE_TOKENS_FIELDS}
    return others | {"peft_type": "LORA", "trainable_token_indices": dict.fromkeys(modules, raw.get("token_indices"))}


def _check_task(raw: dict[str, Any]) -> None:
    task = raw.get("task_type")
    if task is None or task == "CAUSAL_LM":
        return
    if task == "SEQ_2_SEQ_LM":
        refuse("task_type", task, "trained on an encoder-decoder; this server generates with a decoder",
                "adapter_incompatible")  # fmt: skip
    if task in HEAD_TASKS:
        refuse("task_type", task, "task heads are not served: only CAUSAL_LM", "adapter_unsupported")
    refuse("task_type", task, "unknown: only CAUSAL_LM and null are served", "adapter_unsupported")


def _check_init(raw: dict[str, Any]) -> None:
    init = raw.get("init_lora_weights", True)
    if init is None or isinstance(init, bool) or init in PLAIN_INITS:
        return
    if isinstance(init, str) and CHANGED_BASE_INIT.fullmatch(init.lower()):
        fix = (
            "this initialisation changed the base weights; save the adapter again with"
            " save_pretrained(…, path_initial_model_for_weight_conversion=…), which turns it into plain LoRA"
        )
        refuse("init_lora_weights", init, fix, "adapter_unsupported")
    refuse("init_lora_weights", init, "an initialisation that this server does not know", "adapter_unsupported")


def _target_modules(raw: dict[str, Any]) -> tuple[str, ...] | None:
    value = raw.get("target_modules")
    if value is None or isinstance(value, str):
        return None
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        refuse("target_modules", value, "it must be a list of names, a string or null")
    return tuple(value)


def _target_parameters(raw: dict[str, Any]) -> frozenset[str]:
    value = raw.get("target_parameters") or []
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        refuse("target_parameters", value, "it must be a list of names or null")
    return frozenset(value)


def _parse_json(content: bytes) -> dict[str, Any]:
    try:
        raw = json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ManifestError(f"{CONFIG_FILE} is not JSON ({error}): save the adapter again") from None
    if not isinstance(raw, dict):
        raise ManifestError(f"{CONFIG_FILE} is not a JSON object: save the adapter again")
    return raw


def _check_unserved(raw: dict[str, Any]) -> None:
    for field, (harmless, fix) in UNSERVED_FIELDS.items():
        value = raw.get(field)
        if not any(value == item and type(value) is type(item) for item in harmless):
            refuse(field, value, fix, "adapter_unsupported")


def parse_lora_config(content: bytes, tensor_names: Iterable[str], *, has_experts: bool = False) -> LoraConfig:
    """Read the bytes of an adapter_config.json; the names of its tensors tell a LoRA that does not say so.

    Raises ManifestError for broken fields (adapter_invalid) and for features that are not served.
    """
    raw = _as_lora(_parse_json(content), tensor_names)
    warnings = _check_method(raw, tensor_names)
    _check_task(raw)
    _check_init(raw)
    # What is adapted of experts is told by the names of the tensors.
    _check_unserved(
        {field: value for field, value in raw.items() if not (has_experts and field == "target_parameters")}
    )
    flag(raw, "fan_in_fan_out")  # how the base stores its weight; A and B are the same either way
    base_model_name = raw.get("base_model_name_or_path")
    if base_model_name is not None and not isinstance(base_model_name, str):
        refuse("base_model_name_or_path", base_model_name, "it must be a string or null")
    unknown = sorted(raw.keys() - HARMLESS_FIELDS - FEATURE_FIELDS - UNSERVED_FIELDS.keys())
    if unknown:
        warnings.append(f"{CONFIG_FILE} has fields that this server does not know: {shown_names(unknown, 5)}")
    alpha = _alpha("lora_alpha", raw.get("lora_alpha", DEFAULT_ALPHA))
    if alpha == 0:
        warnings.append(f"{CONFIG_FILE}: lora_alpha is 0: the adapter has no effect")
    return LoraConfig(
        rank=_rank("r", raw.get("r", DEFAULT_RANK)),
        alpha=alpha,
        use_rslora=flag(raw, "use_rslora"),
        rank_pattern=_patterns(raw, "rank_pattern", "rank"),
        alpha_pattern=_patterns(raw, "alpha_pattern", "alpha"),
        target_modules=_target_modules(raw),
        target_parameters=_target_parameters(raw),
        base_model_name=base_model_name or None,
        features=parse_features(raw),
        warnings=tuple(warnings),
    )
