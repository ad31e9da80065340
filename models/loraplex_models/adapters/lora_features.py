"""`LoraFeatures`: the fields of adapter_config.json that make more of an adapter than plain A and B."""

from dataclasses import dataclass
from typing import Any, NoReturn

from loraplex_models.adapters.refusal import ManifestError, shown

CONFIG_FILE = "adapter_config.json"
# The two modules beside the layers' linears that an adapter may change, by the last word of their names.
ENDS = ("embed_tokens", "lm_head")
MAX_INVOCATION_TOKENS = 1024
MAX_TOKEN_ROWS = 65536
MAX_BLOCKS = 1024


@dataclass(frozen=True, slots=True)
class BlockDiagonal:
    """BD-LoRA: modules whose name has one of the words store A (or B) as the blocks of a block-diagonal matrix."""

    num_blocks: int
    a_words: tuple[str, ...]
    b_words: tuple[str, ...]

    def blocks(self, peft_path: str) -> tuple[int, int]:
        """In how many blocks a module's A and B are stored; 1: whole."""
        has_a = any(word in peft_path for word in self.a_words)
        has_b = any(word in peft_path for word in self.b_words)
        if has_a and has_b:
            raise ManifestError(
                f"{CONFIG_FILE}: use_bdlora names {shown(peft_path)} both in target_modules_bd_a and in"
                " target_modules_bd_b"
            )
        return (self.num_blocks if has_a else 1), (self.num_blocks if has_b else 1)


@dataclass(frozen=True, slots=True)
class LoraFeatures:
    """What an adapter brings or does beyond its low-rank products."""

    use_dora: bool
    lora_bias: bool
    bias: str  # none, all or lora_only: trained biases of the base are in the file
    modules_to_save: tuple[str, ...]  # the last words of their names: embed_tokens, lm_head
    token_ids: dict[str, tuple[int, ...]]  # by the last word of a module's name: the tokens whose rows are replaced
    block_diagonal: BlockDiagonal | None
    invocation_token_ids: tuple[int, ...]  # activated LoRA; empty: always active


def refuse(field: str, value: Any, problem: str, error_type: Any = "adapter_invalid") -> NoReturn:
    """Raise ManifestError for a field of the config."""
    raise ManifestError(f"{CONFIG_FILE}: {field} is {shown(value)}: {problem}", error_type)


def flag(raw: dict[str, Any], field: str) -> bool:
    """A field that is true, false or left out."""
    value = raw.get(field)
    if value is not None and type(value) is not bool:
        refuse(field, value, "it must be true or false")
    return bool(value)


def _names(field: str, value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        refuse(field, value, "it must be a list of names or null")
    return tuple(value)


def _counts(field: str, value: Any, limit: int) -> tuple[int, ...]:
    if not isinstance(value, list) or not all(type(item) is int and 0 <= item < 2**31 for item in value):
        refuse(field, value, "it must be a list of token ids")
    if len(value) > limit:
        raise ManifestError(f"{CONFIG_FILE}: {field} has {len(value)} token ids, at most {limit} are served")
    return tuple(value)


def _bias(raw: dict[str, Any]) -> str:
    value = raw.get("bias")
    if value is None:
        return "none"
    if value not in ("none", "all", "lora_only"):
        refuse("bias", value, "it must be 'none', 'all' or 'lora_only'")
    return str(value)


def _modules_to_save(raw: dict[str, Any]) -> tuple[str, ...]:
    names = _names("modules_to_save", raw.get("modules_to_save"))
    ends = [name.rpartition(".")[2] for name in names]
    for name, end in zip(names, ends, strict=True):
        if end not in ENDS:
            fix = f"full copies are served of {' and '.join(ENDS)}, not of {shown(name)}: train without it"
            refuse("modules_to_save", list(names), fix, "adapter_unsupported")
    return tuple(dict.fromkeys(ends))


def _token_ids(raw: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    field = "trainable_token_indices"
    value = raw.get(field)
    if value is None or value in ([], {}):
        return {}
    # A bare list is for the input embedding.
    by_module = value if isinstance(value, dict) else {ENDS[0]: value}
    found: dict[str, tuple[int, ...]] = {}
    for name, ids in by_module.items():
        end = name.rpartition(".")[2]
        if end not in ENDS:
            refuse(field, value, f"token rows are served of {' and '.join(ENDS)} only", "adapter_unsupported")
        found[end] = _counts(field, ids, MAX_TOKEN_ROWS)
        if len(set(found[end])) < len(found[end]):
            refuse(field, value, "a token is named twice")
    return found


def _block_diagonal(raw: dict[str, Any]) -> BlockDiagonal | None:
    field = "use_bdlora"
    value = raw.get(field)
    if value is None or value is False:
        return None
    if not isinstance(value, dict):
        refuse(field, value, "it must be an object with nblocks, target_modules_bd_a and target_modules_bd_b")
    num_blocks = value.get("nblocks", 1)
    if type(num_blocks) is not int or not 1 <= num_blocks <= MAX_BLOCKS:
        refuse(f"{field}.nblocks", num_blocks, f"it must be an integer from 1 to {MAX_BLOCKS}")
    a_words, b_words = (
        _names(f"{field}.{name}", value.get(name)) for name in ("target_modules_bd_a", "target_modules_bd_b")
    )
    return BlockDiagonal(num_blocks, a_words, b_words)


def _check_combinations(features: LoraFeatures) -> None:
    """Refuse what PEFT itself cannot train, and what activated LoRA cannot leave to its invocation."""
    variants = {
        "use_dora": features.use_dora,
        "use_bdlora": features.block_diagonal is not None,
        "alora_invocation_tokens": bool(features.invocation_token_ids),
    }
    chosen = [name for name, is_chosen in variants.items() if is_chosen]
    if len(chosen) > 1:
        raise ManifestError(f"{CONFIG_FILE}: {' and '.join(chosen)} exclude each other: only one can be set")
    if features.use_dora and features.lora_bias:
        raise ManifestError(f"{CONFIG_FILE}: lora_bias and use_dora exclude each other: only one can be set")
    if features.invocation_token_ids:
        others = {
            "bias": features.bias != "none",
            "modules_to_save": bool(features.modules_to_save),
            "trainable_token_indices": bool(features.token_ids),
        }
        for name, is_set in others.items():
            if is_set:
                raise ManifestError(
                    f"{CONFIG_FILE}: {name} is not served together with alora_invocation_tokens, before which the"
                    " base answers as it is: train without it",
                    "adapter_unsupported",
                )


def parse_features(raw: dict[str, Any]) -> LoraFeatures:
    """Read the fields. Raises ManifestError."""
    field = "alora_invocation_tokens"
    features = LoraFeatures(
        use_dora=flag(raw, "use_dora"),
        lora_bias=flag(raw, "lora_bias"),
        bias=_bias(raw),
        modules_to_save=_modules_to_save(raw),
        token_ids=_token_ids(raw),
        block_diagonal=_block_diagonal(raw),
        invocation_token_ids=() if raw.get(field) is None else _counts(field, raw[field], MAX_INVOCATION_TOKENS),
    )
    flag(raw, "ensure_weight_tying")  # both sides are in the file, each under its own name
    _check_combinations(features)
    return features
