"""Qwen3-MoE: Qwen3 with experts in place of the MLP, in all layers or in some."""

from loraplex_models.config import ModelConfig
from loraplex_models.decoder import CausalLM
from loraplex_models.layers.activation import GATED_ACTIVATIONS
from loraplex_models.layers.build import Build
from loraplex_models.layers.mlp import MLP
from loraplex_models.layers.moe import SparseMLP
from loraplex_models.qwen3 import Qwen3Layer


class Qwen3MoeLayer(Qwen3Layer):
    """Qwen3's layer, with experts where the config has them."""

    def _make_mlp(self, config: ModelConfig, build: Build) -> MLP | SparseMLP:
        assert config.experts is not None
        if self.index in config.experts.dense_layers:
            return super()._make_mlp(config, build)
        activate = GATED_ACTIVATIONS[config.activation]
        return SparseMLP(build, self.index, config.hidden_size, config.experts, activate)


class Qwen3Moe(CausalLM):
    """Qwen3 with experts."""

    layer_class = Qwen3MoeLayer
