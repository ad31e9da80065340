"""Qwen2 and Qwen2.5: a bias on queries, keys and values; the last layers may have a window."""

from loraplex_models.decoder import CausalLM, DecoderLayer


class Qwen2Layer(DecoderLayer):
    """The shared layer with that bias, whatever the config says."""

    always_has_qkv_bias = True


class Qwen2(CausalLM):
    """Qwen2 and Qwen2.5."""

    layer_class = Qwen2Layer
