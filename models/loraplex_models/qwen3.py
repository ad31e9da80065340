"""Qwen3: each head of queries and keys is normalised."""

from torch import Tensor

from loraplex_kernels.kv_cache import HeadNorms
from loraplex_kernels.lora_pages import RowDelta
from loraplex_models.checkpoint import Checkpoint
from loraplex_models.config import ModelConfig
from loraplex_models.decoder import CausalLM, DecoderLayer
from loraplex_models.forward import LoraBatch
from loraplex_models.layers.attention import Attention
from loraplex_models.layers.build import Build
from loraplex_models.layers.qk_norm import QKNorm


class Qwen3Layer(DecoderLayer):
    """The shared layer with a norm between projection and attention."""

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
        self._qk_norm.load(checkpoint, f"model.{self.prefix}.self_attn")

    def head_norms(self, qkv: Tensor, delta: RowDelta | None) -> HeadNorms:
        """The norms of single heads."""
        return self._qk_norm.of_heads()

    def _project(self, x: Tensor, lora: LoraBatch | None) -> Tensor:
        qkv = super()._project(x, lora)
        self._qk_norm.apply(qkv)
        return qkv


class Qwen3(CausalLM):
    """Qwen3, dense."""

    layer_class = Qwen3Layer
