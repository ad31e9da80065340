"""Tiny random Llama checkpoints and peft adapters, made in a moment: what models and adapters are tested on."""

import gc
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

SEVEN_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# Small random weights would give nearly equal logits for every token; these spread them, so that tokens differ.
WEIGHT_STD = 0.12


def tiny_config(**overrides: Any) -> LlamaConfig:
    """The config of the tiny model; any field of LlamaConfig may be overridden."""
    fields: dict[str, Any] = {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
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
    return LlamaConfig(**(fields | overrides))


def make_tiny_llama(
    folder: str | Path,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    shard_bytes: int | None = None,
    **overrides: Any,
) -> LlamaForCausalLM:
    """Write a random tiny Llama checkpoint to `folder` and return the model, in eval mode, in `dtype`.

    Biases and norms are random too. With `shard_bytes` the checkpoint is split into shards of about that size.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(tiny_config(**overrides))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("bias"):
                    parameter.normal_(std=WEIGHT_STD)
                elif "norm" in name:
                    parameter.uniform_(0.5, 1.5)
    model = model.to(dtype).eval()
    limit = {} if shard_bytes is None else {"max_shard_size": shard_bytes}
    model.save_pretrained(folder, **limit)
    return model


def make_peft_adapter(
    folder: str | Path,
    model: PreTrainedModel,
    *,
    rank: int = 4,
    alpha: float | None = None,
    target_modules: Iterable[str] = SEVEN_LINEARS,
    seed: int = 1,
    scale: float = 1.0,
    **overrides: Any,
) -> Path:
    """Let peft write an adapter with random A and random non-zero B for `model` to `folder`; `model` stays as it was.

    (But for what `bias`, `modules_to_save` and the like have peft train in place: give it a copy then.)

    `overrides` are further fields of LoraConfig (use_rslora, rank_pattern, layers_to_transform, …); whatever they make
    trainable gets other values. Outputs with the adapter differ clearly from those without; `scale` makes it weaker or
    stronger.
    """
    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank if alpha is None else alpha,
        target_modules=list(target_modules),
        task_type="CAUSAL_LM",
        **overrides,
    )
    with torch.random.fork_rng(), peft_warnings_ignored():
        torch.manual_seed(seed)
        adapted = get_peft_model(model, config)
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if "lora_A" in name or "lora_B" in name or "lora_embedding_" in name:
                    # A bias of B has one dimension, and an embedding's A is read by its columns.
                    width = 8 if parameter.ndim == 1 else parameter.shape["embedding_A" not in name]
                    parameter.normal_(std=scale / width**0.5)
                elif "lora_magnitude_vector" in name:
                    parameter.mul_(torch.empty_like(parameter).uniform_(0.7, 1.4))
                elif parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter), alpha=0.5 * WEIGHT_STD)
        adapted.save_pretrained(str(folder))
        adapted.unload()
    _forget_peft(model)
    return Path(folder)


def load_peft(folder: str | Path, model: PreTrainedModel) -> PeftModel:
    """Wrap `model` in the adapter of `folder`, in eval mode; `unload_peft` gives the plain model back."""
    with peft_warnings_ignored():
        return PeftModel.from_pretrained(model, str(folder)).eval()


def unload_peft(adapted: PeftModel) -> PreTrainedModel:
    """Take an adapter off again, leaving the base model as it was before."""
    model: PreTrainedModel = adapted.unload()
    _forget_peft(model)
    return model


@contextmanager
def peft_warnings_ignored() -> Iterator[None]:
    """Let peft use what transformers has marked as on its way out."""
    # peft 0.21 asks transformers 5.23 for attributes that are on their way out.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


def _forget_peft(model: PreTrainedModel) -> None:
    # peft leaves its config on the base model and warns when the next adapter comes.
    for name in ("peft_config", "_hf_peft_config_loaded"):
        vars(model).pop(name, None)
    gc.collect()
