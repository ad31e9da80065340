"""Command-R (Cohere): attention and MLP beside each other, pairs of neighbours turned, scaled logits."""

import torch
from torch import Tensor

from loraplex_models.checkpoint import Checkpoint
from loraplex_models.config import ModelConfig
from loraplex_models.decoder import CausalLM, DecoderLayer
from loraplex_models.forward import LoraBatch
from loraplex_models.layers.attention import Attention, AttentionPlan
from loraplex_models.layers.build import Build
from loraplex_models.layers.norm import LayerNorm


class CohereLayer(DecoderLayer):
    """One layer: x + attention(norm(x)) + mlp(norm(x)), with one norm."""

    norm_class = LayerNorm

    def __init__(self, config: ModelConfig, index: int, attention: Attention, build: Build) -> None:
        super().__init__(config, index, attention, build)
        # Cohere turns elements 2 i and 2 i + 1 of a head together, the shared attention i and i + head_dim / 2. In
        # this order they are the same; scores do not depend on it, and values keep theirs.
        heads = torch.arange((config.num_heads + 2 * config.num_kv_heads) * config.head_dim).view(-1, config.head_dim)
        num_turned = config.num_heads + config.num_kv_heads
        turned = heads[:num_turned].unflatten(1, (-1, 2)).transpose(1, 2)  # type: ignore[no-untyped-call]
        self._order = torch.cat((turned.reshape(-1), heads[num_turned:].reshape(-1))).to(build.device)

    def _load_norms(self, checkpoint: Checkpoint) -> None:
        self.attention_norm.load(checkpoint, f"model.{self.prefix}.input_layernorm.weight")

    def forward(
        self, x: Tensor, angles: tuple[Tensor, Tensor], cache: Tensor, plan: AttentionPlan, lora: LoraBatch | None
    ) -> Tensor:
        """Return the hidden states [T, hidden] after this layer."""
        normed = self.attention_norm.forward(x)
        qkv = self.qkv.forward(normed, lora).index_select(1, self._order)
        x = self.output.forward(self._attention.forward(qkv, cache, plan, *angles), lora, x)
        return self.mlp.forward(normed, lora, x)


class Cohere(CausalLM):
    """Command-R."""

    layer_class = CohereLayer

    def _finish_logits(self, logits: Tensor) -> Tensor:
        scale = self.config.logit_scale
        return logits if scale is None else logits.mul_(scale)
