"""Starcoder2: LayerNorm, a bias everywhere, and an MLP without a gate."""

import torch

from loraplex_models.config import ModelConfig
from loraplex_models.decoder import CausalLM, DecoderLayer
from loraplex_models.layers.activation import ACTIVATIONS
from loraplex_models.layers.attention import Attention
from loraplex_models.layers.norm import BiasedLayerNorm


class Starcoder2Layer(DecoderLayer):
    """The shared layer around that MLP."""

    norm_class = BiasedLayerNorm
    down_name = "mlp.c_proj"

    def __init__(
        self, config: ModelConfig, index: int, attention: Attention, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__(config, index, attention, dtype, device)
        self._activate = ACTIVATIONS[config.activation]

    def _gate_up_parts(self, size: int) -> dict[str, int]:
        return {"mlp.c_fc": size}


class Starcoder2(CausalLM):
    """Starcoder2."""

    layer_class = Starcoder2Layer
