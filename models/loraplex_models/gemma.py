"""Gemma 1 and 2: scaled embeddings and norms around one; Gemma 2 has four norms a layer, capped scores and logits."""

import torch
from torch import Tensor

from loraplex_models.checkpoint import Checkpoint
from loraplex_models.config import ModelConfig
from loraplex_models.decoder import CausalLM, DecoderLayer
from loraplex_models.forward import LoraBatch
from loraplex_models.layers.attention import Attention, AttentionPlan, CappedAttention
from loraplex_models.layers.build import Build
from loraplex_models.layers.norm import OffsetRMSNorm


class GemmaLayer(DecoderLayer):
    """The shared layer with Gemma's norm."""

    norm_class = OffsetRMSNorm


class Gemma(CausalLM):
    """Gemma 1."""

    layer_class: type[DecoderLayer] = GemmaLayer

    def _finish_embedding(self, x: Tensor, positions: Tensor) -> Tensor:
        # The factor is rounded to the model's dtype, as in training.
        scale = torch.tensor(self.config.hidden_size**0.5, dtype=self.dtype).item()
        return x.mul_(scale)


class Gemma2Layer(GemmaLayer):
    """Attention and MLP each between two norms."""

    norm_after_attention: OffsetRMSNorm
    norm_after_mlp: OffsetRMSNorm

    def __init__(self, config: ModelConfig, index: int, attention: Attention, build: Build) -> None:
        super().__init__(config, index, attention, build)
        self.norm_after_attention = OffsetRMSNorm(config.hidden_size, config.norm_eps, build.dtype, build.device)
        self.norm_after_mlp = OffsetRMSNorm(config.hidden_size, config.norm_eps, build.dtype, build.device)

    @property
    def num_bytes(self) -> int:
        """Size of the loaded weights."""
        return super().num_bytes + self.norm_after_attention.num_bytes + self.norm_after_mlp.num_bytes

    def _load_norms(self, checkpoint: Checkpoint) -> None:
        prefix = f"model.{self.prefix}"
        self.attention_norm.load(checkpoint, f"{prefix}.input_layernorm.weight")
        self.norm_after_attention.load(checkpoint, f"{prefix}.post_attention_layernorm.weight")
        self.mlp_norm.load(checkpoint, f"{prefix}.pre_feedforward_layernorm.weight")
        self.norm_after_mlp.load(checkpoint, f"{prefix}.post_feedforward_layernorm.weight")

    def forward(
        self, x: Tensor, angles: tuple[Tensor, Tensor], cache: Tensor, plan: AttentionPlan, lora: LoraBatch | None
    ) -> Tensor:
        """Return the hidden states [T, hidden] after this layer."""
        qkv = self._project(self.attention_norm.forward(x), lora)
        found = self._attention.forward(qkv, cache, plan, *angles)
        x = x + self.norm_after_attention.forward(self.output.forward(found, lora))
        return x + self.norm_after_mlp.forward(self.mlp.forward(self.mlp_norm.forward(x), lora))


class Gemma2(Gemma):
    """Gemma 2."""

    layer_class = Gemma2Layer

    def _make_attention(self) -> Attention:
        config = self.config
        if config.attention_cap is None:
            return super()._make_attention()
        return CappedAttention(
            config.num_heads, config.num_kv_heads, config.head_dim, config.attention_scale, config.attention_cap
        )

    def _finish_logits(self, logits: Tensor) -> Tensor:
        cap = self.config.logit_cap
        return logits if cap is None else logits.div_(cap).tanh_().mul_(cap)
