"""Qwen3: each head of queries and keys is normalised."""

import torch
from torch import Tensor

from loraplex_models.checkpoint import Checkpoint
from loraplex_models.config import ModelConfig
from loraplex_models.decoder import CausalLM, DecoderLayer
from loraplex_models.forward import LoraBatch
from loraplex_models.layers.attention import Attention, AttentionPlan
from loraplex_models.layers.qk_norm import QKNorm


class Qwen3Layer(DecoderLayer):
    """The shared layer with a norm between projection and attention."""

    def __init__(
        self, config: ModelConfig, index: int, attention: Attention, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__(config, index, attention, dtype, device)
        query_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self._qk_norm = QKNorm(query_size, kv_size, config.head_dim, config.norm_eps, dtype, device)

    @property
    def num_bytes(self) -> int:
        """Size of the loaded weights."""
        return super().num_bytes + self._qk_norm.num_bytes

    def _load_norms(self, checkpoint: Checkpoint) -> None:
        super()._load_norms(checkpoint)
        self._qk_norm.load(checkpoint, f"model.{self.prefix}.self_attn")

    def forward(
        self, x: Tensor, angles: tuple[Tensor, Tensor], cache: Tensor, plan: AttentionPlan, lora: LoraBatch | None
    ) -> Tensor:
        """Return the hidden states [T, hidden] after this layer."""
        qkv = self.qkv.forward(self.attention_norm.forward(x), lora)
        self._qk_norm.apply(qkv)
        x = self.output.forward(self._attention.forward(qkv, cache, plan, *angles), lora, x)
        gated = self._activate(self.gate_up.forward(self.mlp_norm.forward(x), lora))
        return self.down.forward(gated, lora, x)


class Qwen3(CausalLM):
    """Qwen3, dense."""

    layer_class = Qwen3Layer
