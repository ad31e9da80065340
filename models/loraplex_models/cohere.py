"""Command-R (Cohere): attention and MLP beside each other, pairs of neighbours turned, scaled logits."""

from torch import Tensor

from loraplex_models.checkpoint import Checkpoint
from loraplex_models.decoder import CausalLM, DecoderLayer
from loraplex_models.forward import LoraBatch
from loraplex_models.layers.attention import Attention, AttentionPlan, NeighbourAttention
from loraplex_models.layers.norm import LayerNorm


class CohereLayer(DecoderLayer):
    """One layer: x + attention(norm(x)) + mlp(norm(x)), with one norm."""

    norm_class = LayerNorm
    is_parallel = True

    def _load_norms(self, checkpoint: Checkpoint) -> None:
        self.attention_norm.load(checkpoint, f"model.{self.prefix}.input_layernorm.weight")

    def forward(
        self, x: Tensor, angles: tuple[Tensor, Tensor], cache: Tensor, plan: AttentionPlan, lora: LoraBatch | None
    ) -> Tensor:
        """Return the hidden states [T, hidden] after this layer."""
        normed = self.attention_norm.forward(x)
        qkv = self.qkv.forward(normed, lora)
        x = self.output.forward(self._attention.forward(qkv, cache, plan, *angles), lora, x)
        return self.mlp.forward(normed, lora, x)


class Cohere(CausalLM):
    """Command-R."""

    layer_class = CohereLayer

    def _make_attention(self) -> Attention:
        config = self.config
        return NeighbourAttention(
            config.num_heads, config.num_kv_heads, config.head_dim, config.attention_scale, self.device
        )

    def _finish_logits(self, logits: Tensor) -> Tensor:
        scale = self.config.logit_scale
        return logits if scale is None else logits.mul_(scale)
