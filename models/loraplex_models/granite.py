"""Granite: the embedding, the scores, what each half of a layer adds, and the logits have multipliers."""

import torch
from torch import Tensor

from loraplex_models.config import ModelConfig
from loraplex_models.decoder import CausalLM, DecoderLayer
from loraplex_models.forward import LoraBatch
from loraplex_models.layers.attention import Attention, AttentionPlan
from loraplex_models.layers.build import Build


class GraniteLayer(DecoderLayer):
    """The shared layer, adding a share of what attention and MLP give."""

    def __init__(self, config: ModelConfig, index: int, attention: Attention, build: Build) -> None:
        super().__init__(config, index, attention, build)
        self.share = 1.0 if config.residual_scale is None else config.residual_scale

    def forward(
        self, x: Tensor, angles: tuple[Tensor, Tensor], cache: Tensor, plan: AttentionPlan, lora: LoraBatch | None
    ) -> Tensor:
        """Return the hidden states [T, hidden] after this layer."""
        qkv = self.qkv.forward(self.attention_norm.forward(x), lora)
        found = self._attention.forward(qkv, cache, plan, *angles)
        x = torch.add(x, self.output.forward(found, lora), alpha=self.share)
        return torch.add(x, self.mlp.forward(self.mlp_norm.forward(x), lora), alpha=self.share)


class Granite(CausalLM):
    """Granite 3, dense."""

    layer_class = GraniteLayer

    def _finish_embedding(self, x: Tensor, positions: Tensor) -> Tensor:
        scale = self.config.embedding_scale
        return x if scale is None else x.mul_(scale)

    def _finish_logits(self, logits: Tensor) -> Tensor:
        scale = self.config.logit_scale
        return logits if scale is None else logits.mul_(scale)
