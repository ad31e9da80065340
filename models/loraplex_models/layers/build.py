"""What the layers of one model are made with, and the linears of a model, numbered as they are made."""

from collections.abc import Mapping

import torch

from loraplex_models.config import ROUTER
from loraplex_models.cuts import is_cut_by_inputs
from loraplex_models.layers.embedding import Embedding, Head
from loraplex_models.layers.linear import Linear
from loraplex_models.layers.parallel import RowLinear, VocabEmbedding, VocabHead
from loraplex_models.parallel import ParallelGroup
from loraplex_quant.keep import Keeping


class Build:
    """The number type, the device and the ranks of one model that is being made, and how its weights are kept."""

    def __init__(self, keeping: Keeping, group: ParallelGroup) -> None:
        self.keeping = keeping
        self.group = group
        self._num_linears = 0

    @property
    def dtype(self) -> torch.dtype:
        """The type of weights and activations."""
        return self.keeping.dtype

    @property
    def device(self) -> torch.device:
        """Where the model runs."""
        return self.keeping.device

    def linear(self, prefix: str, in_size: int, parts: Mapping[str, int], has_bias: bool) -> Linear:
        """Make the next linear, whose parts are named `<prefix>.<name>` in the checkpoint, below `model.`."""
        named = {f"{prefix}.{name}": size for name, size in parts.items()}
        index, keep = self._num_linears, self.keeping.linear
        made = (
            RowLinear(index, in_size, named, has_bias, keep, self.group)
            if self.group.size > 1 and is_cut_by_inputs(next(iter(named)))
            else Linear(index, in_size, named, has_bias, keep)
        )
        self._num_linears += 1
        return made

    def router(self, prefix: str, in_size: int, num_experts: int) -> Linear:
        """Make the next linear, which scores experts: whole on every rank, and never quantised."""
        made = Linear(
            self._num_linears, in_size, {f"{prefix}.{ROUTER}": num_experts}, has_bias=False, keep=self.keeping.plain
        )
        self._num_linears += 1
        return made

    def embedding(self, vocab_size: int, hidden_size: int) -> Embedding:
        """Make the token embedding."""
        if self.group.size > 1:
            return VocabEmbedding(vocab_size, hidden_size, self.dtype, self.device, self.group)
        return Embedding(vocab_size, hidden_size, self.dtype, self.device)

    def head(self, vocab_size: int, hidden_size: int) -> Head:
        """Make the head that gives the logits."""
        if self.group.size > 1:
            return VocabHead(vocab_size, hidden_size, self.keeping, self.group)
        return Head(vocab_size, hidden_size, self.keeping)
