"""Starcoder2: LayerNorm, a bias everywhere, and an MLP without a gate."""

from loraplex_models.config import ModelConfig
from loraplex_models.decoder import CausalLM, DecoderLayer
from loraplex_models.layers.activation import ACTIVATIONS
from loraplex_models.layers.build import Build
from loraplex_models.layers.mlp import MLP
from loraplex_models.layers.norm import BiasedLayerNorm


class Starcoder2Layer(DecoderLayer):
    """The shared layer around that MLP."""

    norm_class = BiasedLayerNorm

    def _make_mlp(self, config: ModelConfig, build: Build) -> MLP:
        hidden, inner = config.hidden_size, config.intermediate_size
        up = build.linear(self.prefix, hidden, {"mlp.c_fc": inner}, config.mlp_bias)
        down = build.linear(self.prefix, inner, {"mlp.c_proj": hidden}, config.mlp_bias)
        return MLP(up, ACTIVATIONS[config.activation], down)


class Starcoder2(CausalLM):
    """Starcoder2."""

    layer_class = Starcoder2Layer
