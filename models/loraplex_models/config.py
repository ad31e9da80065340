"""`ModelConfig`: one frozen, named form of any config.json. Nothing else reads a model's raw config."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


class ModelConfigError(ValueError):
    """A config.json is missing, broken, or describes what is not served; the message says what and why."""


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary embedding: `kind` is default, linear, dynamic, llama3, yarn or longrope, `parameters` its own numbers."""

    theta: float = 10000.0
    kind: str = "default"
    parameters: dict[str, Any] = field(default_factory=dict)


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


DEFAULT_EPS = 1e-6


def _required(raw: dict[str, Any], key: str) -> Any:
    value = raw.get(key)
    if value is None:
        raise ModelConfigError(f"config.json has no '{key}': this is not the config of a causal language model")
    return value


def _rope(raw: dict[str, Any]) -> RopeConfig:
    # transformers 5 writes rope_parameters; older files rope_theta and rope_scaling with 'type' or 'rope_type'.
    parameters = dict(raw.get("rope_parameters") or raw.get("rope_scaling") or {})
    theta = parameters.pop("rope_theta", None) or raw.get("rope_theta") or 10000.0
    legacy_kind = parameters.pop("type", None)
    kind = parameters.pop("rope_type", None) or legacy_kind or "default"
    return RopeConfig(theta=float(theta), kind=str(kind), parameters=parameters)


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
    num_heads = int(_required(raw, "num_attention_heads"))
    hidden_size = int(_required(raw, "hidden_size"))
    architectures = raw.get("architectures") or []
    end_token_ids = _token_ids((generation or {}).get("eos_token_id")) or _token_ids(raw.get("eos_token_id"))
    dtype = str(raw.get("dtype") or raw.get("torch_dtype") or "float32").removeprefix("torch.")
    return ModelConfig(
        architecture=str(architectures[0]) if architectures else str(raw.get("model_type", "unknown")),
        num_layers=int(_required(raw, "num_hidden_layers")),
        hidden_size=hidden_size,
        num_heads=num_heads,
        num_kv_heads=int(raw.get("num_key_value_heads") or num_heads),
        head_dim=int(raw.get("head_dim") or hidden_size // num_heads),
        intermediate_size=int(_required(raw, "intermediate_size")),
        vocab_size=int(_required(raw, "vocab_size")),
        max_positions=int(raw.get("max_position_embeddings") or 2048),
        norm_eps=float(raw.get("rms_norm_eps") or raw.get("layer_norm_eps") or DEFAULT_EPS),
        rope=_rope(raw),
        activation=str(raw.get("hidden_act") or raw.get("hidden_activation") or "silu"),
        attention_bias=bool(raw.get("attention_bias", False)),
        mlp_bias=bool(raw.get("mlp_bias", False)),
        sliding_window=raw.get("sliding_window"),
        tie_embeddings=bool(raw.get("tie_word_embeddings", False)),
        end_token_ids=end_token_ids,
        bos_token_id=raw.get("bos_token_id"),
        dtype=dtype,
        quantization=raw.get("quantization_config"),
    )


def read_config(folder: str | Path) -> ModelConfig:
    """Read config.json, and generation_config.json where there is one, of a model folder.

    Raises ModelConfigError.
    """
    folder = Path(folder)
    generation = folder / "generation_config.json"
    return parse_config(_read_json(folder / "config.json"), _read_json(generation) if generation.exists() else None)
