"""Phi-3, Phi-3.5 and Phi-4: packed linears, in adapters too, and a share of each head that is not turned."""

from loraplex_models.decoder import CausalLM, DecoderLayer


class Phi3Layer(DecoderLayer):
    """The shared layer; qkv_proj and gate_up_proj are one linear each."""

    def _qkv_parts(self, query_size: int, kv_size: int) -> dict[str, int]:
        return {"self_attn.qkv_proj": query_size + 2 * kv_size}

    def _gate_up_parts(self, size: int) -> dict[str, int]:
        return {"mlp.gate_up_proj": 2 * size}


class Phi3(CausalLM):
    """Phi-3, Phi-3.5, Phi-4 and Phi-4-mini."""

    layer_class = Phi3Layer
    turns_shares = True
