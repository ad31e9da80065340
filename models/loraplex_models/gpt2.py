"""GPT-2: learned positions in place of rotary ones, queries, keys and values from one linear, biases everywhere."""

from collections.abc import Iterator

import torch
from torch import Tensor

from loraplex_models.checkpoint import Checkpoint
from loraplex_models.config import ModelConfig
from loraplex_models.decoder import CausalLM
from loraplex_models.layers.embedding import Embedding
from loraplex_models.parallel import ParallelGroup
from loraplex_models.starcoder2 import Starcoder2Layer
from loraplex_quant.keep import Keeping
from loraplex_quant.transposed import Transposed


class GPT2Layer(Starcoder2Layer):
    """Starcoder2's layer with that linear."""

    def _qkv_parts(self, query_size: int, kv_size: int) -> dict[str, int]:
        return {"self_attn.qkv_proj": query_size + 2 * kv_size}


class GPT2(CausalLM):
    """GPT-2."""

    layer_class = GPT2Layer
    plain_format = Transposed()

    def __init__(self, config: ModelConfig, keeping: Keeping, group: ParallelGroup) -> None:
        super().__init__(config, keeping, group)
        self._positions = Embedding(config.max_positions, config.hidden_size, self.dtype, self.device)

    @property
    def num_bytes(self) -> int:
        """Size of the loaded weights."""
        return super().num_bytes + self._positions.num_bytes

    def load(self, checkpoint: Checkpoint) -> Iterator[None]:
        """Take the weights from the checkpoint, part by part; yields after each part. Raises CheckpointError."""
        self._positions.load(checkpoint, "model.embed_positions.weight")
        yield from super().load(checkpoint)

    def _finish_embedding(self, x: Tensor, positions: Tensor) -> Tensor:
        return x.add_(self._positions.forward(positions))

    def _turn_layers(self, positions: Tensor) -> list[tuple[Tensor, Tensor]]:
        # Angles of zero, for the fewest elements of a head that there can be.
        cos = torch.ones(len(positions), 2, dtype=self.dtype, device=self.device)
        return [(cos, torch.zeros_like(cos))] * self.config.num_layers
