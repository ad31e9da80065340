"""Gemma 3, text: Gemma 2 with normalised queries and keys in place of caps, and other angles in windowed layers."""

from torch import Tensor

from loraplex_kernels.kv_cache import HeadNorms
from loraplex_kernels.lora_pages import RowDelta
from loraplex_models.checkpoint import Checkpoint, CheckpointError
from loraplex_models.config import ModelConfig
from loraplex_models.forward import LoraBatch
from loraplex_models.gemma import Gemma2, Gemma2Layer
from loraplex_models.layers.attention import Attention
from loraplex_models.layers.build import Build
from loraplex_models.layers.qk_norm import QKNorm
from loraplex_models.layers.rotary import RopeError, Rotary
from loraplex_models.parallel import ParallelGroup
from loraplex_quant.keep import Keeping


class Gemma3Layer(Gemma2Layer):
    """Gemma 2's layer with a norm of each query and key head."""

    def __init__(self, config: ModelConfig, index: int, attention: Attention, build: Build) -> None:
        super().__init__(config, index, attention, build)
        query_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self._qk_norm = QKNorm(query_size, kv_size, config.head_dim, config.norm_eps, build.dtype, build.device)

    @property
    def num_bytes(self) -> int:
        """Size of the loaded weights."""
        return super().num_bytes + self._qk_norm.num_bytes

    def _load_norms(self, checkpoint: Checkpoint) -> None:
        super()._load_norms(checkpoint)
        self._qk_norm.load(checkpoint, f"model.{self.prefix}.self_attn", offset=1.0)

    def head_norms(self, qkv: Tensor, delta: RowDelta | None) -> HeadNorms:
        """The norms of single heads."""
        return self._qk_norm.of_heads()

    def _project(self, x: Tensor, lora: LoraBatch | None) -> Tensor:
        qkv = super()._project(x, lora)
        self._qk_norm.apply(qkv)
        return qkv


class Gemma3(Gemma2):
    """Gemma 3's language model."""

    layer_class = Gemma3Layer

    def __init__(self, config: ModelConfig, keeping: Keeping, group: ParallelGroup) -> None:
        super().__init__(config, keeping, group)
        rope = config.rope if config.windowed_rope is None else config.windowed_rope
        try:
            self._windowed_rotary = Rotary(rope, config.head_dim, config.max_positions, self.dtype, self.device)
        except RopeError as error:
            raise CheckpointError(str(error)) from None

    def _turn_layers(self, positions: Tensor) -> list[tuple[Tensor, Tensor]]:
        near, far = self._windowed_rotary.angles(positions), self._rotary.angles(positions)
        windowed = self.config.windowed_layers or ()
        return [near if index in windowed else far for index in range(self.config.num_layers)]
