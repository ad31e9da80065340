"""Which class serves which architecture name of a config.json; a class is imported when it is asked for."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from loraplex_models.decoder import CausalLM

ARCHITECTURES: dict[str, tuple[str, str]] = {
    "LlamaForCausalLM": ("loraplex_models.llama", "Llama"),
    "MistralForCausalLM": ("loraplex_models.llama", "Mistral"),
    "Qwen2ForCausalLM": ("loraplex_models.qwen2", "Qwen2"),
    "Qwen3ForCausalLM": ("loraplex_models.qwen3", "Qwen3"),
    "Qwen3MoeForCausalLM": ("loraplex_models.qwen3_moe", "Qwen3Moe"),
    "MixtralForCausalLM": ("loraplex_models.mixtral", "Mixtral"),
    "GraniteForCausalLM": ("loraplex_models.granite", "Granite"),
    "Phi3ForCausalLM": ("loraplex_models.phi3", "Phi3"),
    "GemmaForCausalLM": ("loraplex_models.gemma", "Gemma"),
    "Gemma2ForCausalLM": ("loraplex_models.gemma", "Gemma2"),
    "Gemma3ForCausalLM": ("loraplex_models.gemma3", "Gemma3"),
    "PhiForCausalLM": ("loraplex_models.phi", "Phi"),
    "GPT2LMHeadModel": ("loraplex_models.gpt2", "GPT2"),
    "SmolLM3ForCausalLM": ("loraplex_models.smollm3", "SmolLM3"),
    "Starcoder2ForCausalLM": ("loraplex_models.starcoder2", "Starcoder2"),
    "CohereForCausalLM": ("loraplex_models.cohere", "Cohere"),
    "Olmo2ForCausalLM": ("loraplex_models.olmo2", "Olmo2"),
}


def find_model_class(architecture: str) -> "type[CausalLM] | None":
    """Return the class for an architecture name, or None when it is not served."""
    place = ARCHITECTURES.get(architecture)
    if place is None:
        return None
    model_class: type[CausalLM] = getattr(importlib.import_module(place[0]), place[1])
    return model_class
