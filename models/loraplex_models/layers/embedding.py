"""The token embedding, and the head that gives the logits."""

import torch
from torch import Tensor

from loraplex_models.checkpoint import Checkpoint
from loraplex_models.cuts import Cut
from loraplex_quant.keep import Keeping
from loraplex_quant.method import ALL_ROWS, LinearWeight, QuantMethod


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

    _method: QuantMethod  # from `load` or `tie` on

    def __init__(self, vocab_size: int, hidden_size: int, keeping: Keeping) -> None:
        self._shape = (vocab_size, hidden_size)
        self._keeping = keeping

    @property
    def num_bytes(self) -> int:
        """Size of the loaded weight, less what is the embedding's."""
        return self._method.num_bytes

    def load(self, checkpoint: Checkpoint, name: str) -> None:
        """Take the weight of that name, and the bias beside it where there is one, from the checkpoint."""
        self._method = self._keeping.head(self._read(checkpoint, name, self._shape[0]), may_share=False)

    def tie(self, embedding: Embedding) -> None:
        """Use the embedding's weight. Where the device has a packed layout, this makes a second copy of it."""
        self._method = self._keeping.head(LinearWeight(embedding.weight), may_share=True)

    def dequantize(self, rows: slice = ALL_ROWS) -> Tensor:
        """Return the weight [vocab, hidden], or some rows, in float32; not for every step."""
        return self._method.dequantize(rows)

    def bias(self) -> Tensor | None:
        """Return the bias [vocab] in float32, None where there is none; not for every step."""
        found = self._method.bias
        return None if found is None else found.float()

    def forward(self, hidden: Tensor) -> Tensor:
        """Return the logits [S, vocab] of hidden states [S, hidden], in float32: rounding would tie likely tokens."""
        if len(hidden) == 0:
            return hidden.new_empty(0, self._shape[0], dtype=torch.float32)
        return self._method.logits(hidden)

    def _read(self, checkpoint: Checkpoint, name: str, vocab_size: int, rows: Cut | None = None) -> LinearWeight:
        bias_name = f"{name.removesuffix('weight')}bias"
        bias = checkpoint.take(bias_name, (vocab_size,), rows=rows) if bias_name in checkpoint else None
        return LinearWeight(checkpoint.take(name, (vocab_size, self._shape[1]), rows=rows), bias)
