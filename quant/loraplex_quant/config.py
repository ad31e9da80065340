"""What a checkpoint's quantization_config says, checked; free of torch, so that the launcher can refuse early."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

GPTQ_BITS = (2, 3, 4, 8)
COMPRESSED_BITS = (4, 8)
FLOAT_FORMATS = ("float-quantized", "naive-quantized")  # the second where activations are not quantised
GPTQMODEL_SHIFTS_THREES = 7  # the version from which zeros of 3 bits are AutoGPTQ's
FORMAT_NAMES = ("gptq", "awq", "compressed-tensors", "bitsandbytes", "bitsandbytes-nf4", "bitsandbytes-fp4", "fp8")


class QuantConfigError(ValueError):
    """A quantisation is not served, or is not the one asked for; the message says what and why."""


@dataclass(frozen=True, slots=True)
class QuantConfig:
    """How the quantised linears of a checkpoint are stored.

    `layout` is v1, v1-words or v2 for gptq; gemm or gemv for awq; pack-quantized for compressed-tensors; int8, nf4 or
    fp4 for bitsandbytes; fp8 for fp8, and for compressed-tensors in that form. `group_size` inputs of an output share a
    scale, -1 for all of them.
    """

    method: str
    layout: str
    bits: int
    group_size: int = -1
    is_symmetric: bool = True
    block: tuple[int, int] | None = None  # fp8: outputs and inputs that share a scale; None: one, or one an output
    divides: bool = False  # fp8: whether numbers are divided by their scale, not multiplied

    @property
    def name(self) -> str:
        """The name in messages, and the most exact one that --quantize takes."""
        return f"{self.method}-{self.layout}" if self.layout in ("nf4", "fp4") else self.method


@dataclass(frozen=True, slots=True)
class OnTheFly:
    """What plain weights are quantised to while they are loaded: a kind of `loraplex_quant.rounding`, and its bits.

    `head_kind` is that of the head; None leaves it plain.
    """

    kind: str
    bits: int
    head_kind: str | None = None


# The names of --quantize for plain weights; eetq's weights are int8 with a scale for each output.
ON_THE_FLY = {
    "int8": OnTheFly("int8", 8, "int8"),
    "int4": OnTheFly("int4", 4, "int8"),
    "eetq": OnTheFly("int8", 8),
    "bitsandbytes": OnTheFly("int8", 8),
    "bitsandbytes-nf4": OnTheFly("nf4", 4),
    "bitsandbytes-fp4": OnTheFly("fp4", 4),
    "fp8": OnTheFly("fp8", 8),
}
FLAG_NAMES = tuple(dict.fromkeys((*FORMAT_NAMES, *ON_THE_FLY)))


def check_flag(wanted: str) -> None:
    """Raise QuantConfigError when --quantize names what is not served."""
    if wanted not in FLAG_NAMES:
        raise QuantConfigError(f"--quantize {wanted} is not served; served are {', '.join(FLAG_NAMES)}")


def settle_quantization(wanted: str | None, raw: Any) -> tuple[QuantConfig | None, OnTheFly | None]:
    """Say how a checkpoint's linears are stored, and what plain ones are quantised to; at most one of the two.

    `wanted` is what --quantize says, `raw` the quantization_config as it was read from JSON. Raises QuantConfigError
    for what is not served, and when the two contradict each other.
    """
    config = parse_quantization(raw)
    if wanted is None:
        return config, None
    check_flag(wanted)
    if config is not None:
        if wanted not in (config.method, config.name):
            raise QuantConfigError(
                f"--quantize {wanted}: the checkpoint's weights are {config.name}: leave the flag out"
            )
        return config, None
    if wanted not in ON_THE_FLY:
        raise QuantConfigError(
            f"--quantize {wanted}: the checkpoint's weights are not quantised: leave the flag out, choose a checkpoint "
            f"in that format, or quantise while loading with {', '.join(ON_THE_FLY)}"
        )
    return None, ON_THE_FLY[wanted]


def parse_quantization(raw: Any) -> QuantConfig | None:
    """Name what a quantization_config says, as it was read from JSON; None for plain weights.

    Raises QuantConfigError for what is not served.
    """
    if raw is None:
        return None
    if not isinstance(raw, dict):
        raise QuantConfigError("the quantization_config of the checkpoint is not a JSON object")
    method = str(raw.get("quant_method") or "unknown").lower()
    parse = _PARSERS.get(method)
    if parse is None:
        raise QuantConfigError(f"weights of the format '{method}' are not served; served are {', '.join(_PARSERS)}")
    try:
        return parse(raw)
    except (KeyError, TypeError, AttributeError) as error:
        raise QuantConfigError(f"the {method} quantization_config of the checkpoint is broken: {error!r}") from None


def _refuse(method: str, key: str, value: Any, served: str) -> QuantConfigError:
    return QuantConfigError(f"{method} weights with {key} {value} are not served; served: {served}")


def _group_size(method: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or (value != -1 and value < 1):
        raise _refuse(method, "group_size", value, "a whole number above 0, or -1")
    return value


def _gptq(raw: Mapping[str, Any]) -> QuantConfig:
    if raw["bits"] not in GPTQ_BITS:
        raise _refuse("gptq", "bits", raw["bits"], ", ".join(map(str, GPTQ_BITS)))
    if raw.get("is_marlin_format"):
        raise _refuse("gptq", "format", "marlin", "gptq, gptq_v2")
    stored = raw.get("checkpoint_format") or raw.get("format") or "gptq"
    if stored not in ("gptq", "gptq_v2"):
        raise _refuse("gptq", "format", stored, "gptq, gptq_v2")
    if raw.get("lm_head"):
        raise _refuse("gptq", "lm_head", True, "a plain head")
    if raw.get("pack_dtype", "int32") != "int32":
        raise _refuse("gptq", "pack_dtype", raw["pack_dtype"], "int32")
    changing = [rule for rule in raw.get("dynamic") or {} if not rule.startswith("-:")]
    if changing:
        raise _refuse("gptq", "dynamic rule", f"'{changing[0]}'", "rules that leave modules plain ('-:…')")
    layout = "v2" if stored == "gptq_v2" else "v1"
    if layout == "v1" and _shifts_words(raw):
        layout = "v1-words"
    return QuantConfig("gptq", layout, raw["bits"], _group_size("gptq", raw["group_size"]), bool(raw.get("sym", True)))


def _shifts_words(raw: Mapping[str, Any]) -> bool:
    """Whether GPTQModel wrote the zeros, and took 1 from them word by word; from version 7 on not those of 3 bits."""
    quantizer = (raw.get("meta") or {}).get("quantizer") or []
    for name in [quantizer] if isinstance(quantizer, str) else quantizer:
        writer, _, version = str(name).partition(":")
        if "gptqmodel" in writer:
            major = version.partition(".")[0]
            return raw["bits"] != 3 or (major.isdecimal() and int(major) < GPTQMODEL_SHIFTS_THREES)
    return False


def _awq(raw: Mapping[str, Any]) -> QuantConfig:
    bits = raw["bits"] if "bits" in raw else raw["w_bit"]
    if bits != 4:
        raise _refuse("awq", "bits", bits, "4")
    layout = str(raw.get("version") or raw.get("format") or "gemm").lower()
    if layout not in ("gemm", "gemv"):
        raise _refuse("awq", "version", layout, "gemm, gemv")
    if raw.get("zero_point") is False:
        raise _refuse("awq", "zero_point", False, "true")
    size = raw["group_size"] if "group_size" in raw else raw["q_group_size"]
    return QuantConfig("awq", layout, 4, _group_size("awq", size), is_symmetric=False)


def _compressed_tensors(raw: Mapping[str, Any]) -> QuantConfig:
    name = "compressed-tensors"
    groups = list(raw["config_groups"].values())
    if len(groups) != 1:
        raise _refuse(name, "config_groups", f"of {len(groups)} schemes", "one scheme")
    group, weights = groups[0], groups[0]["weights"]
    stored = group.get("format") or raw.get("format")
    is_fp8 = stored in FLOAT_FORMATS and weights.get("type") == "float" and weights["num_bits"] == 8
    for key in ("input_activations", "output_activations"):
        if group.get(key) and not (is_fp8 and key == "input_activations"):
            raise _refuse(name, key, "quantised", "weights only")
    if raw.get("kv_cache_scheme") or raw.get("transform_config") or _is_sparse(raw.get("sparsity_config")):
        raise _refuse(name, "a KV cache scheme, transforms or sparsity", "set", "weights only")
    if is_fp8:
        if weights.get("strategy") not in ("tensor", "channel", "block"):
            raise _refuse(name, "strategy", weights.get("strategy"), "tensor, channel, block")
        return QuantConfig(name, "fp8", 8, block=_block(name, weights.get("block_structure")))
    if stored != "pack-quantized":
        raise _refuse(name, "format", stored, f"pack-quantized, and {' or '.join(FLOAT_FORMATS)} in 8 bits")
    if weights.get("type", "int") != "int" or weights["num_bits"] not in COMPRESSED_BITS:
        raise _refuse(name, "weights", f"{weights.get('type')}{weights['num_bits']}", "int4, int8")
    if weights.get("strategy") not in ("group", "channel"):
        raise _refuse(name, "strategy", weights.get("strategy"), "group, channel")
    size = weights["group_size"] if weights["strategy"] == "group" else -1
    is_symmetric = bool(weights.get("symmetric", True))
    return QuantConfig(name, stored, weights["num_bits"], _group_size(name, size), is_symmetric)


def _fp8(raw: Mapping[str, Any]) -> QuantConfig:
    if raw.get("fmt", "e4m3") != "e4m3":
        raise _refuse("fp8", "fmt", raw["fmt"], "e4m3")
    block = _block("fp8", raw.get("weight_block_size"))
    semantics = raw.get("weight_scale_semantics")
    if semantics not in (None, "inverse"):
        raise _refuse("fp8", "weight_scale_semantics", semantics, "inverse")
    return QuantConfig("fp8", "fp8", 8, block=block, divides=semantics == "inverse")


def _block(method: str, value: Any) -> tuple[int, int] | None:
    if value is None:
        return None
    if not isinstance(value, list) or len(value) != 2 or not all(type(size) is int and size > 0 for size in value):
        raise _refuse(method, "a block of", value, "two whole numbers above 0")
    return value[0], value[1]


def _is_sparse(sparsity: Mapping[str, Any] | None) -> bool:
    return bool(sparsity) and (sparsity or {}).get("format", "dense") != "dense"


def _bitsandbytes(raw: Mapping[str, Any]) -> QuantConfig:
    if raw.get("load_in_8bit"):
        return QuantConfig("bitsandbytes", "int8", 8)
    kind = raw.get("bnb_4bit_quant_type", "fp4")
    if not raw.get("load_in_4bit") or kind not in ("nf4", "fp4"):
        raise _refuse("bitsandbytes", "bnb_4bit_quant_type", kind, "nf4, fp4, or load_in_8bit")
    return QuantConfig("bitsandbytes", kind, 4)


_PARSERS: dict[str, Callable[[Mapping[str, Any]], QuantConfig]] = {
    "gptq": _gptq,
    "awq": _awq,
    "compressed-tensors": _compressed_tensors,
    "bitsandbytes": _bitsandbytes,
    "fp8": _fp8,
    "fbgemm_fp8": _fp8,
}
