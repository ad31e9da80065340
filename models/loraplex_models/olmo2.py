"""OLMo 2: queries and keys are normalised over all heads together; the norms stand after attention and MLP."""

import torch
from torch import Tensor

from loraplex_models.checkpoint import Checkpoint
from loraplex_models.config import ModelConfig
from loraplex_models.decoder import CausalLM, DecoderLayer
from loraplex_models.forward import LoraBatch
from loraplex_models.layers.attention import Attention, AttentionPlan
from loraplex_models.layers.qk_norm import QKNorm


class Olmo2Layer(DecoderLayer):
    """One layer: x + norm(attention(x)), then x + norm(mlp(x))."""

    def __init__(
        self, config: ModelConfig, index: int, attention: Attention, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__(config, index, attention, dtype, device)
        query_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self._qk_norm = QKNorm(query_size, kv_size, None, config.norm_eps, dtype, device)

    @property
    def num_bytes(self) -> int:
        """Size of the loaded weights."""
        return super().num_bytes + self._qk_norm.num_bytes

    def _load_norms(self, checkpoint: Checkpoint) -> None:
        prefix = f"model.{self.prefix}"
        self.attention_norm.load(checkpoint, f"{prefix}.post_attention_layernorm.weight")
        self.mlp_norm.load(checkpoint, f"{prefix}.post_feedforward_layernorm.weight")
        self._qk_norm.load(checkpoint, f"{prefix}.self_attn")

    def forward(
        self, x: Tensor, angles: tuple[Tensor, Tensor], cache: Tensor, plan: AttentionPlan, lora: LoraBatch | None
    ) -> Tensor:
        """Return the hidden states [T, hidden] after this layer."""
        qkv = self.qkv.forward(x, lora)
        self._qk_norm.apply(qkv)
        found = self._attention.forward(qkv, cache, plan, *angles)
        x = x + self.attention_norm.forward(self.output.forward(found, lora))
        gated = self._activate(self.gate_up.forward(x, lora))
        return x + self.mlp_norm.forward(self.down.forward(gated, lora))


class Olmo2(CausalLM):
    """OLMo 2."""

    layer_class = Olmo2Layer
