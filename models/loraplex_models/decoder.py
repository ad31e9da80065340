"""The decoder that most families share: attention and a gated MLP, each after a norm and beside the residual."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

from torch import Tensor

from loraplex_kernels.flashinfer_prompts import PromptAttention
from loraplex_kernels.kv_cache import HeadNorms
from loraplex_kernels.lora_pages import RowDelta
from loraplex_models.checkpoint import Checkpoint, CheckpointError
from loraplex_models.config import ModelConfig
from loraplex_models.cuts import split
from loraplex_models.forward import AttentionBatch, ForwardBatch, LoraBatch
from loraplex_models.layers.activation import GATED_ACTIVATIONS
from loraplex_models.layers.attention import Attention, AttentionPlan, KVCache, plan_attention
from loraplex_models.layers.build import Build
from loraplex_models.layers.linear import Linear
from loraplex_models.layers.mlp import MLP
from loraplex_models.layers.moe import SparseMLP
from loraplex_models.layers.norm import RMSNorm, add_and_norm
from loraplex_models.layers.rotary import RopeError, Rotary
from loraplex_models.layers.tiled_moe import TiledExpertLinear
from loraplex_models.parallel import ParallelGroup
from loraplex_quant.keep import Keeping
from loraplex_quant.method import ALL_ROWS, WeightFormat


@dataclass(frozen=True, slots=True)
class LoraSite:
    """One linear of the checkpoint that an adapter may change; `module` is `layers.0.self_attn.q_proj` or alike."""

    module: str
    in_size: int
    out_size: int


class DecoderLayer:
    """One layer: x + attention(norm(x)), then x + mlp(norm(x)). A family overrides what is different in it.

    `forward` is what a CPU runs. What a family has different there, it also declares, for `forward_fused`.
    """

    norm_class: type[RMSNorm] = RMSNorm
    always_has_qkv_bias = False
    is_parallel = False  # the MLP reads what attention reads
    # What becomes of what attention and MLP give before it is added: it is normalised, and scaled.
    norm_after_attention: RMSNorm | None = None
    norm_after_mlp: RMSNorm | None = None
    share = 1.0

    def __init__(self, config: ModelConfig, index: int, attention: Attention, build: Build) -> None:
        hidden, query_size = config.hidden_size, config.num_heads * config.head_dim
        qkv_parts = self._qkv_parts(query_size, config.num_kv_heads * config.head_dim)
        has_qkv_bias = self.always_has_qkv_bias or config.attention_bias
        self.index = index
        self.prefix = f"layers.{index}"
        self.qkv = build.linear(self.prefix, hidden, qkv_parts, has_qkv_bias)
        self.output = build.linear(self.prefix, query_size, {"self_attn.o_proj": hidden}, config.attention_bias)
        self.mlp = self._make_mlp(config, build)
        self.attention_norm = self.norm_class(hidden, config.norm_eps, build.dtype, build.device)
        self.mlp_norm = self.norm_class(hidden, config.norm_eps, build.dtype, build.device)
        self._attention = attention

    def _make_mlp(self, config: ModelConfig, build: Build) -> MLP | SparseMLP:
        hidden, inner = config.hidden_size, config.intermediate_size
        up = build.linear(self.prefix, hidden, self._gate_up_parts(inner), config.mlp_bias)
        down = build.linear(self.prefix, inner, {"mlp.down_proj": hidden}, config.mlp_bias)
        return MLP(up, GATED_ACTIVATIONS[config.activation], down)

    def _qkv_parts(self, query_size: int, kv_size: int) -> dict[str, int]:
        return {"self_attn.q_proj": query_size, "self_attn.k_proj": kv_size, "self_attn.v_proj": kv_size}

    def _gate_up_parts(self, size: int) -> dict[str, int]:
        return {"mlp.gate_proj": size, "mlp.up_proj": size}

    @property
    def linears(self) -> tuple[Linear, ...]:
        """The layer's linears, by their index."""
        return (self.qkv, self.output, *self.mlp.linears)

    @property
    def num_bytes(self) -> int:
        """Size of the loaded weights."""
        norm_bytes = self.attention_norm.num_bytes + self.mlp_norm.num_bytes
        return norm_bytes + self.qkv.num_bytes + self.output.num_bytes + self.mlp.num_bytes

    def load(self, checkpoint: Checkpoint) -> None:
        """Take the layer's weights from the checkpoint."""
        self.qkv.load(checkpoint, "model.")
        self.output.load(checkpoint, "model.")
        self.mlp.load(checkpoint)
        self._load_norms(checkpoint)

    def _load_norms(self, checkpoint: Checkpoint) -> None:
        self.attention_norm.load(checkpoint, f"model.{self.prefix}.input_layernorm.weight")
        self.mlp_norm.load(checkpoint, f"model.{self.prefix}.post_attention_layernorm.weight")

    def forward(
        self, x: Tensor, angles: tuple[Tensor, Tensor], cache: Tensor, plan: AttentionPlan, lora: LoraBatch | None
    ) -> Tensor:
        """Return the hidden states [T, hidden] after this layer."""
        qkv = self._project(self.attention_norm.forward(x), lora)
        found = self._attention.forward(qkv, cache, plan, *angles)
        x = self.output.forward(found, lora, x)
        return self.mlp.forward(self.mlp_norm.forward(x), lora, x)

    def forward_fused(
        self,
        x: Tensor,
        residual: Tensor,
        angles: tuple[Tensor, Tensor],
        cache: Tensor,
        plan: AttentionPlan,
        lora: LoraBatch | None,
        next_norm: RMSNorm,
    ) -> Tensor:
        """As `forward`, by kernels that add the residual and the adapters' deltas to what they read anyway.

        x: what `attention_norm` gave; `residual` is changed in place. Returns what `next_norm` makes of it.
        """
        qkv, delta = self.qkv.project(x, lora)
        found = self._attention.forward(qkv, cache, plan, *angles, delta, self.head_norms(qkv, delta))
        out, delta = self.output.project(found, lora)
        if self.is_parallel:
            add_and_norm(out, residual, delta, None, share=self.share)
        else:
            x = add_and_norm(out, residual, delta, self.mlp_norm, self.norm_after_attention, self.share)
        out, delta = self.mlp.project(x, lora)
        return add_and_norm(out, residual, delta, next_norm, self.norm_after_mlp, self.share)

    def head_norms(self, qkv: Tensor, delta: RowDelta | None) -> HeadNorms | None:
        """The norms of queries and keys, where a family has them; `delta` is still to be added to `qkv`."""
        return None

    def _project(self, x: Tensor, lora: LoraBatch | None) -> Tensor:
        return self.qkv.forward(x, lora)


class CausalLM:
    """A decoder with its embedding and head. Made empty; `load` fills it. A family overrides what is different."""

    layer_class: type[DecoderLayer] = DecoderLayer
    turns_shares = False  # whether the config's partial_rotary_factor leaves a share of each head unturned
    plain_format: WeightFormat | None = None  # how linears are stored that are not quantised; None: as [out, in]
    prompt_attention: PromptAttention | None = None  # on a GPU, where prompts attend by FlashInfer

    def __init__(self, config: ModelConfig, keeping: Keeping, group: ParallelGroup) -> None:
        """Lay out this rank's part of the model, of which `config` is the config, without weights.

        Raises CheckpointError for what the config asks and nobody serves.
        """
        if config.activation not in GATED_ACTIVATIONS:
            served = ", ".join(GATED_ACTIVATIONS)
            raise CheckpointError(f"activation '{config.activation}' is not served; served are {served}")
        self.config = config
        self.dtype = dtype = keeping.dtype
        self.device = device = keeping.device
        self.group = group
        try:
            self._rotary = self._make_rotary()
        except RopeError as error:
            raise CheckpointError(str(error)) from None
        attention, build = self._make_attention(), Build(keeping, group)
        self._embedding = build.embedding(config.vocab_size, config.hidden_size)
        self.layers = [self.layer_class(config, i, attention, build) for i in range(config.num_layers)]
        for index, linear in enumerate(self.expert_linears, len(self.linears)):
            linear.index = index
        self._norm = self.layer_class.norm_class(config.hidden_size, config.norm_eps, dtype, device)
        self._head = build.head(config.vocab_size, config.hidden_size)

    @property
    def linears(self) -> tuple[Linear, ...]:
        """All linears that adapters may change, by their index."""
        return tuple(linear for layer in self.layers for linear in layer.linears)

    @property
    def expert_linears(self) -> tuple[TiledExpertLinear, ...]:
        """On a GPU the experts' linears that adapters may change, layer by layer up and down; by their index."""
        sparse = [layer.mlp for layer in self.layers if isinstance(layer.mlp, SparseMLP)]
        return tuple(linear for mlp in sparse for linear in mlp.expert_linears)

    @property
    def routers(self) -> frozenset[int]:
        """The linears that score experts, by their index."""
        sparse = [layer.mlp for layer in self.layers if isinstance(layer.mlp, SparseMLP)]
        return frozenset(linear.index for mlp in sparse for linear in mlp.linears)

    @property
    def can_be_captured(self) -> bool:
        """Whether a pass on a GPU asks nothing of the device and does nothing new from one to the next."""
        return self.group.can_be_captured

    @property
    def lora_sites(self) -> tuple[LoraSite, ...]:
        """The checkpoint's linears that adapters may change, layer by layer."""
        return tuple(
            LoraSite(module, linear.in_size, out_size)
            for linear in self.linears
            for module, out_size in linear.parts.items()
        )

    @property
    def num_bytes(self) -> int:
        """Size of the loaded weights."""
        ends = self._embedding.num_bytes + self._norm.num_bytes + self._head.num_bytes
        return ends + sum(layer.num_bytes for layer in self.layers)

    def load(self, checkpoint: Checkpoint) -> Iterator[None]:
        """Take the weights from the checkpoint, part by part; yields after each part. Raises CheckpointError."""
        self._embedding.load(checkpoint, "model.embed_tokens.weight")
        yield
        for layer in self.layers:
            layer.load(checkpoint)
            yield
        self._norm.load(checkpoint, "model.norm.weight")
        if self.config.tie_embeddings:
            self._head.tie(self._embedding)
        else:
            self._head.load(checkpoint, "lm_head.weight")
        yield

    def base_weight(self, module: str, rows: slice = ALL_ROWS) -> Tensor:
        """Return rows of a linear's weight [out, in], or of lm_head's or embed_tokens' [vocab, hidden]; float32."""
        if module == "embed_tokens":
            return self._embedding.weight[rows].float()
        if module == "lm_head":
            return self._head.dequantize(rows)
        linear, columns = self._linear_of(module)
        start, stop, _ = rows.indices(columns.stop - columns.start)
        return linear.dequantize(slice(columns.start + start, columns.start + stop))

    @property
    def first_token(self) -> int:
        """The token whose row is the first that this rank has of the embedding and the head."""
        return split(self.config.vocab_size, self.group.size, self.group.rank)[0]

    def base_bias(self, module: str) -> Tensor | None:
        """Return the bias of a linear or of lm_head, [out] in float32; None where it has none."""
        if module == "lm_head":
            return self._head.bias()
        linear, columns = self._linear_of(module)
        bias = linear.bias()
        return None if bias is None else bias[columns]

    def _linear_of(self, module: str) -> tuple[Linear, slice]:
        """The linear that a module is part of, and its outputs."""
        for linear in self.linears:
            start = 0
            for name, size in linear.parts.items():
                if name == module:
                    return linear, slice(start, start + size)
                start += size
        raise KeyError(module)

    def kv_bytes_per_block(self, block_size: int) -> int:
        """Size of one KV block over all layers."""
        cell_size = 2 * self.config.num_kv_heads * self.config.head_dim
        return self.config.num_layers * block_size * cell_size * self.dtype.itemsize

    def new_kv_cache(self, num_blocks: int, block_size: int) -> KVCache:
        """Return an empty cache of that many blocks."""
        config = self.config
        return KVCache(
            num_layers=config.num_layers,
            num_blocks=num_blocks,
            block_size=block_size,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            dtype=self.dtype,
            device=self.device,
        )

    def forward(self, batch: ForwardBatch, kv_cache: KVCache) -> Tensor:
        """Return the logits of `batch.sample_rows`, [S, vocab] in float32; writes the cache in place.

        To be called under torch.inference_mode.
        """
        plans = self._plan_layers(batch.attention, kv_cache)
        turns = self._turn_layers(batch.positions)
        lora = batch.lora
        x = self._embedding.forward(batch.token_ids)
        if lora is not None and lora.embedding is not None:
            lora.embedding.apply(x, batch.token_ids, lora.segments)
        x = self._finish_embedding(x, batch.positions)
        parts = list(zip(self.layers, turns, kv_cache.layers, plans, strict=True))
        if plans[0].blocks is not None and (lora is None or lora.extras is None):
            hidden = self._run_fused(x, parts, lora).index_select(0, batch.sample_rows)
        else:
            for layer, angles, cache, plan in parts:
                x = layer.forward(x, angles, cache, plan, lora)
            hidden = self._norm.forward(x.index_select(0, batch.sample_rows))
        logits = self._head.forward(hidden)
        if lora is not None and lora.head is not None:
            lora.head.apply(logits, hidden, batch.sample_rows, lora.segments)
        return self._finish_logits(logits)

    def _run_fused(
        self,
        x: Tensor,
        parts: list[tuple[DecoderLayer, tuple[Tensor, Tensor], Tensor, AttentionPlan]],
        lora: LoraBatch | None,
    ) -> Tensor:
        """All layers and the last norm, for a GPU; x [T, hidden] is changed in place."""
        norms = [layer.attention_norm for layer in self.layers] + [self._norm]
        normed = norms[0].forward(x)
        for (layer, angles, cache, plan), next_norm in zip(parts, norms[1:], strict=True):
            normed = layer.forward_fused(normed, x, angles, cache, plan, lora, next_norm)
        return normed

    def _make_rotary(self) -> Rotary:
        config = self.config
        parameters = dict(config.rope.parameters)
        turned = config.head_dim
        if self.turns_shares:
            turned = int(turned * parameters.pop("partial_rotary_factor", 1.0))
        rope = replace(config.rope, parameters=parameters)
        return Rotary(rope, turned, config.max_positions, self.dtype, self.device)

    def _make_attention(self) -> Attention:
        config = self.config
        return Attention(config.num_heads, config.num_kv_heads, config.head_dim, config.attention_scale)

    def _plan_layers(self, batch: AttentionBatch, kv_cache: KVCache) -> list[AttentionPlan]:
        """One plan a layer: the same for all, or one for the layers with the window and one for the others."""
        config = self.config
        groups_decodes = config.attention_cap is not None  # capped scores have no form straight from the blocks
        plan = partial(plan_attention, groups_decodes=groups_decodes, prompts=self.prompt_attention)
        near = plan(batch, kv_cache, config.sliding_window)
        if config.windowed_layers is None:
            return [near] * config.num_layers
        far = plan(batch, kv_cache, None)
        return [near if index in config.windowed_layers else far for index in range(config.num_layers)]

    def _turn_layers(self, positions: Tensor) -> list[tuple[Tensor, Tensor]]:
        """The angles of each layer; here the same for all."""
        return [self._rotary.angles(positions)] * self.config.num_layers

    def _finish_embedding(self, x: Tensor, positions: Tensor) -> Tensor:
        """What becomes of the embedded tokens [T, hidden] before the first layer; may be done in place."""
        return x

    def _finish_logits(self, logits: Tensor) -> Tensor:
        """What becomes of the head's product [S, vocab]; may be done in place."""
        return logits
