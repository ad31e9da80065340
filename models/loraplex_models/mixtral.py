"""Mixtral: Mistral with experts in place of the MLP."""

from loraplex_models.config import ModelConfig
from loraplex_models.decoder import CausalLM, DecoderLayer
from loraplex_models.layers.activation import GATED_ACTIVATIONS
from loraplex_models.layers.build import Build
from loraplex_models.layers.moe import SparseMLP


class MixtralLayer(DecoderLayer):
    """The shared layer around the experts."""

    def _make_mlp(self, config: ModelConfig, build: Build) -> SparseMLP:
        assert config.experts is not None
        activate = GATED_ACTIVATIONS[config.activation]
        return SparseMLP(build, self.index, config.hidden_size, config.experts, activate)


class Mixtral(CausalLM):
    """Mixtral."""

    layer_class = MixtralLayer
