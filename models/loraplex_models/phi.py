"""Phi-1, 1.5 and 2: attention and MLP beside each other after one norm, an MLP without a gate, biases everywhere."""

from torch import Tensor

from loraplex_models.checkpoint import Checkpoint
from loraplex_models.decoder import CausalLM
from loraplex_models.forward import LoraBatch
from loraplex_models.layers.attention import AttentionPlan
from loraplex_models.starcoder2 import Starcoder2Layer


class PhiLayer(Starcoder2Layer):
    """One layer: x + attention(norm(x)) + mlp(norm(x)), with one norm."""

    is_parallel = True

    def _load_norms(self, checkpoint: Checkpoint) -> None:
        self.attention_norm.load(checkpoint, f"model.{self.prefix}.input_layernorm.weight")

    def forward(
        self, x: Tensor, angles: tuple[Tensor, Tensor], cache: Tensor, plan: AttentionPlan, lora: LoraBatch | None
    ) -> Tensor:
        """Return the hidden states [T, hidden] after this layer."""
        normed = self.attention_norm.forward(x)
        found = self._attention.forward(self._project(normed, lora), cache, plan, *angles)
        return self.mlp.forward(normed, lora, self.output.forward(found, lora, x))


class Phi(CausalLM):
    """Phi-1, 1.5 and 2."""

    layer_class = PhiLayer
    turns_shares = True
