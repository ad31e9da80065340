"""Llama 1 to 3, SmolLM2, and Mistral, which differs in its window only: the shared decoder as it is."""

from loraplex_models.decoder import CausalLM


class Llama(CausalLM):
    """The plain case."""


class Mistral(CausalLM):
    """Llama with a window, where the config gives one: a token sees that many tokens, itself included."""
