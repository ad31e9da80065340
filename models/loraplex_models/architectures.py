"""The architecture names of a config.json that are served, and where their classes stand; no torch."""

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


def refusal(architecture: str) -> str:
    """Why an architecture is not served, what is, and what may serve it all the same."""
    return (
        f"architecture '{architecture}' is not served; served are {', '.join(ARCHITECTURES)}; with --modeling "
        "transformers it may run, slower, through the modelling code of the package transformers"
    )
