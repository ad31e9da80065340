"""Adapters written by hand, so that each thing in them can be wrong by itself."""

import json
import struct
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from loraplex_models.config import ModelConfig, parse_config

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"

HIDDEN, QUERIES, KEYS, INTERMEDIATE, VOCABULARY, NUM_LAYERS = 32, 32, 16, 48, 100, 2
SHAPES = {
    "self_attn.q_proj": (HIDDEN, QUERIES),
    "self_attn.k_proj": (HIDDEN, KEYS),
    "self_attn.v_proj": (HIDDEN, KEYS),
    "self_attn.o_proj": (QUERIES, HIDDEN),
    "mlp.gate_proj": (HIDDEN, INTERMEDIATE),
    "mlp.up_proj": (HIDDEN, INTERMEDIATE),
    "mlp.down_proj": (INTERMEDIATE, HIDDEN),
}
PREFIX = "base_model.model.model."


def base_fields() -> dict[str, Any]:
    """The config.json of the base model that the adapters here are for."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "num_hidden_layers": NUM_LAYERS,
        "hidden_size": HIDDEN,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": INTERMEDIATE,
        "vocab_size": VOCABULARY,
    }


def base_config(**overrides: Any) -> ModelConfig:
    """The base model that the adapters here are for."""
    return parse_config(base_fields() | overrides)


def config_fields(**overrides: Any) -> dict[str, Any]:
    """A plain adapter_config.json of rank 4."""
    fields = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "acme/tiny",
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj", "down_proj"],
    }
    return fields | overrides


def lora_tensors(
    rank: int = 4, modules: tuple[str, ...] = ("self_attn.q_proj", "mlp.down_proj"), prefix: str = PREFIX
) -> dict[str, torch.Tensor]:
    """Random A and B of the named modules in both layers."""
    generator = torch.Generator().manual_seed(rank)
    tensors = {}
    for layer in range(NUM_LAYERS):
        for module in modules:
            num_in, num_out = SHAPES[module]
            name = f"{prefix}layers.{layer}.{module}"
            tensors[f"{name}.lora_A.weight"] = torch.randn(rank, num_in, generator=generator)
            tensors[f"{name}.lora_B.weight"] = torch.randn(num_out, rank, generator=generator)
    return tensors


def write_adapter(
    folder: Path, config: dict[str, Any] | None = None, tensors: dict[str, torch.Tensor] | None = None
) -> Path:
    """Write an adapter; what is not given is plain and fits."""
    folder.mkdir(exist_ok=True)
    (folder / CONFIG_FILE).write_text(json.dumps(config_fields() if config is None else config))
    save_file(lora_tensors() if tensors is None else tensors, folder / WEIGHTS_FILE)
    return folder


def write_raw_weights(folder: Path, header: Any, data: bytes = b"") -> None:
    """Write a weights file with this header, well formed or not."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    (folder / WEIGHTS_FILE).write_bytes(struct.pack("<Q", len(raw)) + raw + data)
