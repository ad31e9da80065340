"""`ModelConfig`: one frozen, named form of any config.json. Nothing else reads a model's raw config."""

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from loraplex_models.adapters.refusal import ManifestError
from loraplex_models.architectures import ARCHITECTURES
from loraplex_models.checkpoint_linears import LinearShape, read_linears


class ModelConfigError(ValueError):
    """A config.json is missing, broken, or describes what is not served; the message says what and why."""


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary embedding: `kind` is default, linear, dynamic, llama3, yarn or longrope, `parameters` its own numbers."""

    theta: float = 10000.0
    kind: str = "default"
    parameters: dict[str, Any] = field(default_factory=dict)


# The linear that chooses a token's experts, in layers that have some; its outputs are their scores.
ROUTER = "mlp.gate"


@dataclass(frozen=True, slots=True)
class ExpertNames:
    """What a checkpoint calls an expert's linears: `mlp.experts.<number>.<gate, up or down>`."""

    gate: str
    up: str
    down: str


@dataclass(frozen=True, slots=True)
class ExpertsConfig:
    """A mixture of experts: how many, how many of them a token goes to, and the layers that have a plain MLP instead.

    `rescales`: the weights of a token's experts are divided by their sum.
    """

    num_experts: int
    num_chosen: int
    inner_size: int
    rescales: bool
    names: ExpertNames
    dense_layers: tuple[int, ...] = ()

    def part_sizes(self, hidden_size: int) -> tuple[dict[str, int], dict[str, int]]:
        """By name the output sizes of the two linears that an expert's are fused to: gate and up, and down."""
        names, inner = self.names, self.inner_size
        return {names.gate: inner, names.up: inner}, {names.down: hidden_size}


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The shape of a decoder model. Lengths are counts of elements; `head_dim` is per head."""

    architecture: str
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    max_positions: int
    norm_eps: float
    rope: RopeConfig
    activation: str
    attention_bias: bool
    mlp_bias: bool
    sliding_window: int | None
    tie_embeddings: bool
    end_token_ids: tuple[int, ...]
    bos_token_id: int | None
    dtype: str  # what the checkpoint says: float16, bfloat16 or float32
    quantization: dict[str, Any] | None
    # What some families add; None where the plain rule holds.
    windowed_layers: tuple[int, ...] | None = None  # those with the window; None: all
    windowed_rope: RopeConfig | None = None  # of the layers with the window; None: as the others
    unturned_layers: tuple[int, ...] = ()  # those without rotary embedding
    has_gated_mlp: bool = True  # else c_fc and c_proj, with the activation between
    has_packed_linears: bool = False  # qkv_proj, and gate_up_proj if there is a gate, are one linear each
    attention_scale: float | None = None  # of the scores, in place of head_dim ** -0.5
    attention_cap: float | None = None  # scores become cap * tanh(score / cap)
    residual_scale: float | None = None  # of what attention and MLP add
    embedding_scale: float | None = None
    logit_scale: float | None = None
    logit_cap: float | None = None
    experts: ExpertsConfig | None = None
    # Of a family that is not ours: the linears that the checkpoint's layers have, in place of the usual ones.
    linears: tuple[LinearShape, ...] | None = None


DEFAULT_EPS = 1e-6

# What transformers takes when a family's config.json leaves a key out, where that is not the plain rule.
FAMILY_DEFAULTS: dict[str, dict[str, Any]] = {
    "Qwen2ForCausalLM": {"use_sliding_window": False, "max_window_layers": 28},
    "Qwen3ForCausalLM": {"use_sliding_window": False, "max_window_layers": 28, "head_dim": 128},
    "Qwen3MoeForCausalLM": {
        "use_sliding_window": False,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
        "norm_topk_prob": False,
    },
    "MixtralForCausalLM": {"num_local_experts": 8, "num_experts_per_tok": 2, "rope_theta": 1000000.0},
    "PhiForCausalLM": {
        "use_bias": True,
        "hidden_act": "gelu_new",
        "layer_norm_eps": 1e-5,
        "partial_rotary_factor": 0.5,
    },
    "GPT2LMHeadModel": {
        "tie_word_embeddings": True,
        "use_bias": True,
        "n_positions": 1024,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
    },
    "SmolLM3ForCausalLM": {
        "tie_word_embeddings": True,
        "use_sliding_window": False,
        "rope_theta": 2000000.0,
        "no_rope_layer_interval": 4,
    },
    "Starcoder2ForCausalLM": {
        "tie_word_embeddings": True,
        "use_bias": True,
        "norm_epsilon": 1e-5,
        "hidden_act": "gelu_pytorch_tanh",
    },
    "CohereForCausalLM": {"tie_word_embeddings": True, "logit_scale": 0.0625, "layer_norm_eps": 1e-5},
    "GemmaForCausalLM": {"tie_word_embeddings": True, "head_dim": 256},
    "Gemma2ForCausalLM": {
        "tie_word_embeddings": True,
        "head_dim": 256,
        "sliding_window": 4096,
        "query_pre_attn_scalar": 256,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "sliding_window_pattern": 2,
    },
    "Gemma3ForCausalLM": {
        "tie_word_embeddings": True,
        "head_dim": 256,
        "sliding_window": 4096,
        "query_pre_attn_scalar": 256,
        "sliding_window_pattern": 6,
        "rope_theta": 1000000.0,
        "rope_local_base_freq": 10000.0,
    },
}
PACKED_ARCHITECTURES = ("Phi3ForCausalLM", "GPT2LMHeadModel")
UNGATED_ARCHITECTURES = ("Starcoder2ForCausalLM", "PhiForCausalLM", "GPT2LMHeadModel")
# Other names of keys: ours, theirs.
FAMILY_KEYS = {
    "GPT2LMHeadModel": {
        "hidden_size": "n_embd",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "intermediate_size": "n_inner",
        "max_position_embeddings": "n_positions",
        "hidden_act": "activation_function",
        "layer_norm_eps": "layer_norm_epsilon",
    }
}


def _required(raw: dict[str, Any], key: str) -> Any:
    value = raw.get(key)
    if value is None:
        raise ModelConfigError(f"config.json has no '{key}': this is not the config of a causal language model")
    return value


def _max_positions(raw: dict[str, Any]) -> int:
    return int(raw.get("max_position_embeddings") or 2048)


def _rope(raw: dict[str, Any]) -> RopeConfig:
    # transformers 5 writes rope_parameters; older files rope_theta and rope_scaling with 'type' or 'rope_type'.
    parameters = dict(raw.get("rope_parameters") or raw.get("rope_scaling") or {})
    if "full_attention" in parameters:  # one for each kind of layer
        parameters = dict(parameters["full_attention"])
    theta = parameters.pop("rope_theta", None) or raw.get("rope_theta") or 10000.0
    legacy_kind = parameters.pop("type", None)
    kind = parameters.pop("rope_type", None) or legacy_kind or "default"
    if kind in ("longrope", "su"):
        kind = "longrope"
        original = parameters.get("original_max_position_embeddings") or raw.get("original_max_position_embeddings")
        if not original:
            raise ModelConfigError("rope scaling 'longrope' needs original_max_position_embeddings")
        parameters["original_max_position_embeddings"] = int(original)
        if parameters.get("factor") is None:
            parameters["factor"] = _max_positions(raw) / original
    if raw.get("partial_rotary_factor") is not None:
        parameters.setdefault("partial_rotary_factor", raw["partial_rotary_factor"])
    return RopeConfig(theta=float(theta), kind=str(kind), parameters=parameters)


def _unturned_layers(raw: dict[str, Any]) -> tuple[int, ...]:
    num_layers = int(_required(raw, "num_hidden_layers"))
    if raw.get("no_rope_layers"):  # which says 1 for a layer with rotary embedding
        return tuple(i for i, is_turned in enumerate(raw["no_rope_layers"]) if not is_turned)
    interval = raw.get("no_rope_layer_interval")
    return tuple(range(interval - 1, num_layers, interval)) if interval else ()


def _windowed_rope(raw: dict[str, Any]) -> RopeConfig | None:
    by_kind = raw.get("rope_parameters") or {}
    if "sliding_attention" in by_kind:
        return _rope(raw | {"rope_parameters": by_kind["sliding_attention"], "rope_scaling": None})
    theta = raw.get("rope_local_base_freq")
    return None if theta is None else RopeConfig(theta=float(theta))


def _windowed_layers(raw: dict[str, Any], architecture: str) -> tuple[int, ...] | None:
    """The layers that see no further than the window; None when all do."""
    num_layers = int(_required(raw, "num_hidden_layers"))
    if raw.get("layer_types"):
        unknown = sorted(set(raw["layer_types"]) - {"full_attention", "sliding_attention"})
        if unknown or len(raw["layer_types"]) != num_layers:
            raise ModelConfigError(f"layer_types of {num_layers} layers cannot be served: {raw['layer_types']}")
        return tuple(i for i, kind in enumerate(raw["layer_types"]) if kind == "sliding_attention")
    if architecture == "SmolLM3ForCausalLM":
        return _unturned_layers(raw)
    if raw.get("sliding_window_pattern"):
        # One layer in so many sees everything, the others have the window.
        return tuple(i for i in range(num_layers) if (i + 1) % int(raw["sliding_window_pattern"]))
    if (
        architecture != "Qwen3MoeForCausalLM"
        and raw.get("use_sliding_window")
        and raw.get("max_window_layers") is not None
    ):
        return tuple(range(int(raw["max_window_layers"]), num_layers))
    return None


def _activation(raw: dict[str, Any], architecture: str) -> str:
    name = str(raw.get("hidden_activation") or raw.get("hidden_act") or "silu")
    # Gemma's first configs say gelu and mean its tanh form; transformers reads them so.
    return "gelu_pytorch_tanh" if architecture == "GemmaForCausalLM" and name == "gelu" else name


def _norm_eps(raw: dict[str, Any]) -> float:
    names = ("rms_norm_eps", "layer_norm_eps", "norm_epsilon")
    return next((float(raw[name]) for name in names if raw.get(name)), DEFAULT_EPS)


def _optional(raw: dict[str, Any], key: str) -> float | None:
    return None if raw.get(key) is None else float(raw[key])


def _attention_scale(raw: dict[str, Any]) -> float | None:
    base = _optional(raw, "query_pre_attn_scalar")
    return _optional(raw, "attention_multiplier") if base is None else base**-0.5


def _experts(raw: dict[str, Any], architecture: str) -> ExpertsConfig | None:
    if architecture == "MixtralForCausalLM":
        inner_size, rescales = int(_required(raw, "intermediate_size")), True
        names = ExpertNames(gate="w1", up="w3", down="w2")
    elif architecture == "Qwen3MoeForCausalLM":
        inner_size, rescales = int(_required(raw, "moe_intermediate_size")), bool(raw["norm_topk_prob"])
        names = ExpertNames(gate="gate_proj", up="up_proj", down="down_proj")
    else:
        return None
    num_experts = int(_required(raw, "num_local_experts" if "num_local_experts" in raw else "num_experts"))
    num_chosen = int(_required(raw, "num_experts_per_tok"))
    if not 1 <= num_chosen <= num_experts:
        raise ModelConfigError(f"num_experts_per_tok {num_chosen} of {num_experts} experts cannot be served")
    num_layers, step = int(_required(raw, "num_hidden_layers")), int(raw.get("decoder_sparse_step") or 1)
    named = raw.get("mlp_only_layers") or ()
    dense_layers = tuple(i for i in range(num_layers) if i in named or (i + 1) % step)
    return ExpertsConfig(num_experts, num_chosen, inner_size, rescales, names, dense_layers)


def _token_ids(value: Any) -> tuple[int, ...]:
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list) else (int(value),)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelConfigError(f"no {path.name} in the model folder '{path.parent}'") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ModelConfigError(f"{path.name} of the model cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise ModelConfigError(f"{path.name} of the model is not a JSON object")
    return value


def parse_config(raw: dict[str, Any], generation: dict[str, Any] | None = None) -> ModelConfig:
    """Name what a raw config.json (and generation_config.json) says.

    Raises ModelConfigError where a needed key is absent.
    """
    architectures = raw.get("architectures") or []
    architecture = str(architectures[0]) if architectures else str(raw.get("model_type", "unknown"))
    raw = FAMILY_DEFAULTS.get(architecture, {}) | raw
    raw |= {ours: raw.get(theirs) for ours, theirs in FAMILY_KEYS.get(architecture, {}).items()}
    if architecture in UNGATED_ARCHITECTURES and raw.get("intermediate_size") is None:
        raw["intermediate_size"] = 4 * int(_required(raw, "hidden_size"))
    num_heads = int(_required(raw, "num_attention_heads"))
    hidden_size = int(_required(raw, "hidden_size"))
    end_token_ids = _token_ids((generation or {}).get("eos_token_id")) or _token_ids(raw.get("eos_token_id"))
    dtype = str(raw.get("dtype") or raw.get("torch_dtype") or "float32").removeprefix("torch.")
    is_ours = architecture in ARCHITECTURES
    if is_ours and raw.get("use_qk_norm"):
        raise ModelConfigError("use_qk_norm: Cohere's models with normalised queries and keys are not served")
    if is_ours and raw.get("qk_layernorm"):
        raise ModelConfigError("qk_layernorm: Phi models with normalised queries and keys are not served")
    if raw.get("scale_attn_by_inverse_layer_idx") or raw.get("scale_attn_weights") is False:
        raise ModelConfigError("GPT-2 models that scale scores by layer, or not at all, are not served")
    if raw.get("use_bidirectional_attention"):
        raise ModelConfigError("use_bidirectional_attention: only models whose tokens see what came before are served")
    window = raw.get("sliding_window") if raw.get("use_sliding_window", True) else None
    rope = _rope(raw)
    # Beyond the original length longrope turns all tokens by other angles, those in the cache too: not served.
    max_positions = rope.parameters["original_max_position_embeddings"] if rope.kind == "longrope" else None
    logits_divisor = _optional(raw, "logits_scaling")
    return ModelConfig(
        architecture=architecture,
        num_layers=int(_required(raw, "num_hidden_layers")),
        hidden_size=hidden_size,
        num_heads=num_heads,
        num_kv_heads=int(raw.get("num_key_value_heads") or num_heads),
        head_dim=int(raw.get("head_dim") or hidden_size // num_heads),
        intermediate_size=int(_required(raw, "intermediate_size")),
        vocab_size=int(_required(raw, "vocab_size")),
        max_positions=max_positions or _max_positions(raw),
        norm_eps=_norm_eps(raw),
        rope=rope,
        activation=_activation(raw, architecture),
        attention_bias=bool(raw.get("attention_bias", raw.get("use_bias", False))),
        mlp_bias=bool(raw.get("mlp_bias", raw.get("use_bias", False))),
        sliding_window=window,
        tie_embeddings=bool(raw.get("tie_word_embeddings", False)),
        end_token_ids=end_token_ids,
        bos_token_id=raw.get("bos_token_id"),
        dtype=dtype,
        quantization=raw.get("quantization_config"),
        windowed_layers=None if window is None else _windowed_layers(raw, architecture),
        windowed_rope=_windowed_rope(raw),
        unturned_layers=_unturned_layers(raw),
        has_gated_mlp=architecture not in UNGATED_ARCHITECTURES,
        has_packed_linears=architecture in PACKED_ARCHITECTURES,
        attention_scale=_attention_scale(raw),
        attention_cap=_optional(raw, "attn_logit_softcapping"),
        residual_scale=_optional(raw, "residual_multiplier"),
        embedding_scale=_optional(raw, "embedding_multiplier"),
        logit_scale=_optional(raw, "logit_scale") if logits_divisor is None else 1 / logits_divisor,
        logit_cap=_optional(raw, "final_logit_softcapping"),
        experts=_experts(raw, architecture),
    )


# Where older writers put what is now quantization_config in config.json, and what they meant without a quant_method.
QUANTIZATION_FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq"}


def read_config(folder: str | Path) -> ModelConfig:
    """Read config.json of a model folder, and what stands beside it: generation_config.json, a quantisation's config.

    Raises ModelConfigError.
    """
    folder = Path(folder)
    raw = _read_json(folder / "config.json")
    for name, method in QUANTIZATION_FILES.items():
        if raw.get("quantization_config") is None and (folder / name).exists():
            raw["quantization_config"] = {"quant_method": method} | _read_json(folder / name)
    generation = folder / "generation_config.json"
    config = parse_config(raw, _read_json(generation) if generation.exists() else None)
    if config.architecture in ARCHITECTURES:
        return config
    try:
        return replace(config, linears=read_linears(folder) or None)
    except (ManifestError, OSError) as error:
        raise ModelConfigError(f"the model's weights cannot be read: {error}") from None
