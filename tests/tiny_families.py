"""A tiny random checkpoint of each served family, as transformers writes it."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from tiny_models import SEVEN_LINEARS, WEIGHT_STD, make_peft_adapter
from transformers import PreTrainedModel

SPARSE_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate")  # with the router; experts are tested apart
PACKED_LINEARS = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")


@dataclass(frozen=True)
class Family:
    """Its architecture name, the fields of its config that differ from the common ones, and its linears."""

    architecture: str
    fields: dict[str, Any] = field(default_factory=dict)
    linears: tuple[str, ...] = SEVEN_LINEARS
    fan_in_fan_out: bool = False  # its weights are stored as [in, out]


# Score and logit caps are low, so that they bend what random weights give; windows are shorter than the prompts.
FAMILIES = {
    "Llama": Family("LlamaForCausalLM"),
    "Mistral": Family("MistralForCausalLM", {"sliding_window": 9}),
    "Qwen2": Family("Qwen2ForCausalLM"),
    "Qwen2, window in some layers": Family(
        "Qwen2ForCausalLM", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}
    ),
    "Qwen3": Family("Qwen3ForCausalLM", {"head_dim": 32, "tie_word_embeddings": True}),
    "Qwen3-MoE": Family(
        "Qwen3MoeForCausalLM",
        {"head_dim": 32, "num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 40},
        SPARSE_LINEARS,
    ),
    "Qwen3-MoE, one layer dense": Family(
        "Qwen3MoeForCausalLM",
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 40,
            "norm_topk_prob": True,
            "mlp_only_layers": [1],
        },
        SPARSE_LINEARS,  # peft takes the names of the dense layer's MLP for the experts'
    ),
    "Mixtral": Family(
        "MixtralForCausalLM",
        {"num_local_experts": 6, "num_experts_per_tok": 2, "sliding_window": 9},
        SPARSE_LINEARS,
    ),
    "Granite": Family(
        "GraniteForCausalLM",
        {
            "embedding_multiplier": 3.0,
            "attention_multiplier": 0.1,
            "residual_multiplier": 0.6,
            "logits_scaling": 2.0,
            "tie_word_embeddings": True,
        },
    ),
    "Phi-3": Family("Phi3ForCausalLM", {"sliding_window": 9}, PACKED_LINEARS),
    "Phi-4-mini, longrope": Family(
        "Phi3ForCausalLM",
        {
            "original_max_position_embeddings": 256,
            "partial_rotary_factor": 0.75,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 0.75,
                "short_factor": [1.0, 1.1, 1.3, 1.7, 2.0, 2.4],
                "long_factor": [1.0, 2.0, 4.0, 8.0, 9.0, 10.0],
            },
            "tie_word_embeddings": True,
        },
        PACKED_LINEARS,
    ),
    "Phi-2": Family(
        "PhiForCausalLM", {"partial_rotary_factor": 0.5}, ("q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2")
    ),
    "GPT-2": Family(
        "GPT2LMHeadModel",
        {
            "n_embd": 64,
            "n_layer": 3,
            "n_head": 4,
            "n_positions": 512,
            "num_key_value_heads": 4,
            "tie_word_embeddings": True,
        },
        ("c_attn", "c_proj", "c_fc"),
        fan_in_fan_out=True,
    ),
    "Gemma": Family("GemmaForCausalLM", {"head_dim": 32, "num_key_value_heads": 1, "tie_word_embeddings": True}),
    "Gemma 2": Family(
        "Gemma2ForCausalLM",
        {
            "head_dim": 32,
            "sliding_window": 9,
            "query_pre_attn_scalar": 24,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
            "tie_word_embeddings": True,
        },
    ),
    "Gemma 3, text": Family(
        "Gemma3ForCausalLM",
        {
            "head_dim": 32,
            "sliding_window": 9,
            "query_pre_attn_scalar": 24,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 50000.0, "factor": 4.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1000.0},
            },
            "tie_word_embeddings": True,
        },
    ),
    "SmolLM3": Family("SmolLM3ForCausalLM", {"no_rope_layers": [1, 0, 1], "tie_word_embeddings": True}),
    "Starcoder2": Family(
        "Starcoder2ForCausalLM",
        {"sliding_window": 9, "tie_word_embeddings": True},
        ("q_proj", "k_proj", "v_proj", "o_proj", "c_fc", "c_proj"),
    ),
    "Command-R": Family("CohereForCausalLM", {"logit_scale": 0.5, "tie_word_embeddings": True}),
    "OLMo 2": Family("Olmo2ForCausalLM"),
}


def make_tiny(family: Family, folder: str | Path, *, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """Write a random tiny checkpoint of the family to `folder` and return the model, in eval mode.

    Biases and norms are random too. `overrides` are further fields of its config.
    """
    model_class = getattr(transformers, family.architecture)
    common: dict[str, Any] = {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "initializer_range": WEIGHT_STD,
        "tie_word_embeddings": False,
        "rms_norm_eps": 1e-5,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
        "attn_implementation": "eager",
    }
    config = model_class.config_class(**(common | family.fields | overrides))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: PreTrainedModel = model_class(config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("bias"):
                    parameter.normal_(std=WEIGHT_STD)
                elif "norm" in name or ".ln_" in name:
                    parameter.add_(torch.rand_like(parameter) - 0.5)
    model.eval()
    model.save_pretrained(folder)
    return model


def make_family_adapter(folder: str | Path, model: PreTrainedModel, family: Family, rank: int) -> Path:
    """Let peft write an adapter on all linears of the family; ranks give different adapters."""
    return make_peft_adapter(
        folder, model, rank=rank, target_modules=family.linears, seed=rank, fan_in_fan_out=family.fan_in_fan_out
    )
