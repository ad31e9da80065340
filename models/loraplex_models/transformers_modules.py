"""What stands in the modules of a transformers model in place of its own: linears, embedding, head and attention."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from loraplex_models.checkpoint import CheckpointError
from loraplex_models.forward import ForwardBatch
from loraplex_models.layers.attention import Attention, AttentionPlan, KVCache, plan_attention
from loraplex_models.layers.embedding import Embedding, Head
from loraplex_models.layers.linear import Linear

# The name under which transformers' code finds our attention; it makes no masks for one that it does not know.
ATTENTION_NAME = "loraplex_paged"
# What the code of models hands to an attention function and what changes nothing here.
IDLE_ARGUMENTS = {"dropout", "position_ids", "cache_position", "use_cache", "output_attentions", "is_causal"}


class Step:
    """What the modules that stand in for transformers' own need to know of the step that is computed."""

    def __init__(self, batch: ForwardBatch, kv_cache: KVCache) -> None:
        self.batch = batch
        self.kv_cache = kv_cache
        self.windows: dict[int, int | None] = {}  # by layer that has attended
        self._plans: dict[int | None, AttentionPlan] = {}
        self.cos = torch.ones(len(batch.positions), 2, dtype=kv_cache.dtype, device=batch.positions.device)
        self.sin = torch.zeros_like(self.cos)  # with `cos`: angles of zero, as the model's code has turned the heads

    def plan(self, window: int | None) -> AttentionPlan:
        """The groups of the step's sequences for layers with that window."""
        if window not in self._plans:
            self._plans[window] = plan_attention(self.batch.attention, self.kv_cache, window)
        return self._plans[window]


class Now:
    """Where the modules of one model find its step."""

    step: Step


class LinearModule(nn.Module):
    """In place of an nn.Linear of a layer."""

    def __init__(self, linear: Linear, now: Now) -> None:
        super().__init__()
        self._linear = linear
        self._now = now

    def forward(self, x: Tensor) -> Tensor:
        """x: [1, T, in]. Returns the product with each token's adapter delta, [1, T, out]."""
        # The kernels read dense rows of the model's own type.
        rows = x.reshape(-1, x.shape[-1]).to(self._now.step.kv_cache.dtype).contiguous()
        out = self._linear.forward(rows, self._now.step.batch.lora)
        return out.view(*x.shape[:-1], -1)


class EmbeddingModule(nn.Module):
    """In place of the nn.Embedding of the tokens."""

    def __init__(self, embedding: Embedding, now: Now) -> None:
        super().__init__()
        self._embedding = embedding
        self._now = now

    def forward(self, token_ids: Tensor) -> Tensor:
        """token_ids: [1, T]. Returns their rows, as their adapters have them, [1, T, hidden]."""
        x, lora = self._embedding.forward(token_ids[0]), self._now.step.batch.lora
        if lora is not None and lora.embedding is not None:
            lora.embedding.apply(x, token_ids[0], lora.segments)
        return x.unsqueeze(0)


class HeadModule(nn.Module):
    """In place of the head."""

    def __init__(self, head: Head, now: Now) -> None:
        super().__init__()
        self._head = head
        self._now = now

    def forward(self, x: Tensor) -> Tensor:
        """x: [1, T, hidden]. Returns the logits of the sampled rows alone, [1, S, vocab] in float32."""
        batch = self._now.step.batch
        hidden = x[0].index_select(0, batch.sample_rows).to(self._now.step.kv_cache.dtype)
        logits = self._head.forward(hidden)
        if batch.lora is not None and batch.lora.head is not None:
            batch.lora.head.apply(logits, hidden, batch.sample_rows, batch.lora.segments)
        return logits.unsqueeze(0)


class PagedAttention:
    """Attention of all layers over the paged cache, called by the model's code with heads that it has turned."""

    def __init__(self, num_kv_heads: int, head_dim: int, now: Now) -> None:
        self._num_kv_heads = num_kv_heads
        self._head_dim = head_dim
        self._now = now
        self._attentions: dict[tuple[int, float | None], Attention] = {}

    def attend(
        self, layer: int, heads: tuple[Tensor, Tensor, Tensor], scale: float | None, window: int | None
    ) -> Tensor:
        """heads: queries, keys and values, each [1, heads, T, head_dim]. Returns [1, T, heads, head_dim]."""
        step, queries = self._now.step, heads[0]
        num_heads = queries.shape[1]
        if any(part.shape[1] != self._num_kv_heads for part in heads[1:]) or any(
            part.shape[3] != self._head_dim for part in heads
        ):
            raise CheckpointError("its attention has other heads than its config.json says")
        attention = self._attentions.get((num_heads, scale))
        if attention is None:
            attention = Attention(num_heads, self._num_kv_heads, self._head_dim, scale)
            self._attentions[num_heads, scale] = attention
        dtype = step.kv_cache.dtype
        qkv = torch.cat([part[0].transpose(0, 1).flatten(1).to(dtype) for part in heads], dim=1)
        step.windows[layer] = window
        found = attention.forward(qkv, step.kv_cache.layers[layer], step.plan(window), step.cos, step.sin)
        return found.view(1, -1, num_heads, self._head_dim).to(queries.dtype)


def attention_function(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """What transformers calls; see its AttentionInterface."""
    unknown = sorted(name for name, value in others.items() if value is not None and name not in IDLE_ARGUMENTS)
    if attention_mask is not None:
        unknown.append("attention_mask")
    if unknown or getattr(module, "is_causal", True) is False:
        raise CheckpointError(f"its attention is not plain causal attention ({', '.join(unknown) or 'is_causal'})")
    owner: Any = module
    paged: PagedAttention = owner.loraplex_attention
    return paged.attend(owner.layer_idx, (query, key, value), scaling, sliding_window), None


AttentionInterface.register(ATTENTION_NAME, attention_function)
