"""OLMo 2: queries and keys are normalised over all heads together; the norms stand after attention and MLP."""

from torch import Tensor

from loraplex_kernels.kv_cache import HeadNorms
from loraplex_kernels.lora_pages import RowDelta
from loraplex_models.checkpoint import Checkpoint
from loraplex_models.config import ModelConfig
from loraplex_models.decoder import CausalLM, DecoderLayer
from loraplex_models.forward import LoraBatch
from loraplex_models.layers.attention import Attention, AttentionPlan
from loraplex_models.layers.build import Build
from loraplex_models.layers.norm import NoNorm, RMSNorm
from loraplex_models.layers.qk_norm import WholeQKNorm


class Olmo2Layer(DecoderLayer):
    """One layer: x + norm(attention(x)), then x + norm(mlp(x))."""

    norm_after_attention: RMSNorm
    norm_after_mlp: RMSNorm

    def __init__(self, config: ModelConfig, index: int, attention: Attention, build: Build) -> None:
        super().__init__(config, index, attention, build)
        sizes = config.hidden_size, config.norm_eps, build.dtype, build.device
        self.attention_norm = self.mlp_norm = NoNorm(*sizes)
        self.norm_after_attention, self.norm_after_mlp = RMSNorm(*sizes), RMSNorm(*sizes)
        query_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self._qk_norm = WholeQKNorm(query_size, kv_size, config.norm_eps, build.dtype, build.device, build.group)

    @property
    def num_bytes(self) -> int:
        """Size of the loaded weights."""
        norms = (self.norm_after_attention, self.norm_after_mlp, self._qk_norm)
        return super().num_bytes + sum(norm.num_bytes for norm in norms)

    def _load_norms(self, checkpoint: Checkpoint) -> None:
        prefix = f"model.{self.prefix}"
        self.norm_after_attention.load(checkpoint, f"{prefix}.post_attention_layernorm.weight")
        self.norm_after_mlp.load(checkpoint, f"{prefix}.post_feedforward_layernorm.weight")
        self._qk_norm.load(checkpoint, f"{prefix}.self_attn")

    def head_norms(self, qkv: Tensor, delta: RowDelta | None) -> HeadNorms:
        """The norms of all heads together."""
        return self._qk_norm.of_all(qkv, delta)

    def _project(self, x: Tensor, lora: LoraBatch | None) -> Tensor:
        qkv = super()._project(x, lora)
        self._qk_norm.apply(qkv)
        return qkv

    def forward(
        self, x: Tensor, angles: tuple[Tensor, Tensor], cache: Tensor, plan: AttentionPlan, lora: LoraBatch | None
    ) -> Tensor:
        """Return the hidden states [T, hidden] after this layer."""
        found = self._attention.forward(self._project(x, lora), cache, plan, *angles)
        x = x + self.norm_after_attention.forward(self.output.forward(found, lora))
        return x + self.norm_after_mlp.forward(self.mlp.forward(x, lora))


class Olmo2(CausalLM):
    """OLMo 2."""

    layer_class = Olmo2Layer
