"""The token embedding, and the head that gives the logits."""

import torch
from torch import Tensor

from loraplex_kernels.linear import PackedWeight, linear, pack_weight, unpack_weight
from loraplex_models.checkpoint import Checkpoint


class Embedding:
    """One row for each token of the vocabulary."""

    def __init__(self, vocab_size: int, hidden_size: int, dtype: torch.dtype, device: torch.device) -> None:
        self._shape = (vocab_size, hidden_size)
        self._dtype = dtype
        self._device = device
        self.weight = torch.empty(0)

    @property
    def num_bytes(self) -> int:
        """Size of the loaded weight."""
        return self.weight.nbytes

    def load(self, checkpoint: Checkpoint, name: str) -> None:
        """Take the weight of that name from the checkpoint."""
        # A copy, or the rows would stay in the checkpoint's mapped file.
        self.weight = checkpoint.take(name, self._shape).to(self._device, self._dtype, copy=True)

    def forward(self, token_ids: Tensor) -> Tensor:
        """Return the rows of the tokens, [T, hidden]."""
        return self.weight.index_select(0, token_ids)


class Head:
    """The linear from the last hidden state to the vocabulary."""

    def __init__(self, vocab_size: int, hidden_size: int, dtype: torch.dtype, device: torch.device) -> None:
        self._shape = (vocab_size, hidden_size)
        self._dtype = dtype
        self._device = device
        self._weight: Tensor | PackedWeight = torch.empty(0)
        self.num_bytes = 0

    def load(self, checkpoint: Checkpoint, name: str) -> None:
        """Take the weight of that name from the checkpoint."""
        self._pack(checkpoint.take(name, self._shape).to(self._device, self._dtype))

    def tie(self, embedding: Embedding) -> None:
        """Use the embedding's weight. Where the device has a packed layout, this makes a second copy of it."""
        self._pack(embedding.weight)

    def dequantize(self) -> Tensor:
        """Return the weight [vocab, hidden] in float32, in memory of its own; not for every step."""
        return unpack_weight(self._weight).to(torch.float32, copy=True)

    def forward(self, hidden: Tensor) -> Tensor:
        """Return the logits [S, vocab] of hidden states [S, hidden], in their dtype."""
        if len(hidden) == 0:
            return hidden.new_empty(0, self._shape[0])
        return linear(hidden, self._weight)

    def _pack(self, weight: Tensor) -> None:
        self._weight = pack_weight(weight)
        self.num_bytes = 0 if self._weight is weight else weight.nbytes
