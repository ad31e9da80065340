"""Layers of which each rank holds a part, and whose outputs the ranks put together."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from loraplex_kernels.lora_pages import add_rows
from loraplex_models.checkpoint import Checkpoint
from loraplex_models.cuts import Cut, split
from loraplex_models.forward import LoraBatch
from loraplex_models.layers.embedding import Embedding, Head
from loraplex_models.layers.linear import Linear
from loraplex_models.parallel import ParallelGroup
from loraplex_quant.keep import Keeping
from loraplex_quant.method import LinearWeight, QuantMethod


class RowLinear(Linear):
    """A linear that is cut by inputs: each rank's product is a summand, and so is each rank's part of the deltas.

    B is linear, so B (A1 x1 + A2 x2) is the sum of what the ranks get with their parts of A; one sum serves all. So
    each rank adds its deltas to its product, and nothing is left to the operation that reads the sum.
    """

    def __init__(
        self,
        index: int,
        in_size: int,
        parts: Mapping[str, int],
        has_bias: bool,
        keep: Callable[[Sequence[LinearWeight]], QuantMethod],
        group: ParallelGroup,
    ) -> None:
        super().__init__(index, in_size, parts, has_bias, keep)
        self._group = group

    def forward(self, x: Tensor, lora: LoraBatch | None, addend: Tensor | None = None) -> Tensor:
        """Return the whole product, plus the bias, plus `addend`, plus the deltas. x: [T, this rank's inputs]."""
        out = super().forward(x, lora, addend if self._group.rank == 0 else None)
        return self._group.all_reduce(out)

    def project(self, x: Tensor, lora: LoraBatch | None) -> tuple[Tensor, None]:
        """Return the whole product with its deltas."""
        out, delta = self._project(x, lora)
        if delta is not None:
            add_rows(out, delta)
        return self._group.all_reduce(out), None


class VocabEmbedding(Embedding):
    """An embedding cut by tokens: a rank gives zeros for those that others have."""

    def __init__(
        self, vocab_size: int, hidden_size: int, dtype: torch.dtype, device: torch.device, group: ParallelGroup
    ) -> None:
        super().__init__(vocab_size, hidden_size, dtype, device)
        self._group = group
        self._run = split(vocab_size, group.size, group.rank)

    def load(self, checkpoint: Checkpoint, name: str) -> None:
        """Take this rank's rows of the weight of that name from the checkpoint."""
        rows = checkpoint.take(name, self._shape, rows=Cut(self._shape[0], (self._run,)))
        self.weight = rows.to(self._device, self._dtype, copy=True)

    def forward(self, token_ids: Tensor) -> Tensor:
        """Return the rows of the tokens, [T, hidden]."""
        start, stop = self._run
        is_elsewhere = (token_ids < start) | (token_ids >= stop)
        rows = super().forward((token_ids - start).masked_fill_(is_elsewhere, 0))
        return self._group.all_reduce(rows.masked_fill_(is_elsewhere.unsqueeze(1), 0))


class VocabHead(Head):
    """A head cut by tokens: the ranks' logits are put side by side."""

    def __init__(self, vocab_size: int, hidden_size: int, keeping: Keeping, group: ParallelGroup) -> None:
        run = split(vocab_size, group.size, group.rank)
        super().__init__(run[1] - run[0], hidden_size, keeping)
        self._group = group
        self._run = run
        self._vocab_size = vocab_size

    def load(self, checkpoint: Checkpoint, name: str) -> None:
        """Take this rank's rows of the weight of that name, and of the bias beside it, from the checkpoint."""
        rows = self._read(checkpoint, name, self._vocab_size, Cut(self._vocab_size, (self._run,)))
        self._method = self._keeping.head(rows, may_share=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """Return the logits [S, vocab] of hidden states [S, hidden], in float32."""
        size = self._group.size
        longest = -(-self._vocab_size // size)
        logits = super().forward(hidden)
        if logits.shape[1] < longest:
            logits = torch.nn.functional.pad(logits, (0, longest - logits.shape[1]))
        gathered = self._group.all_gather(logits)
        if longest * size == self._vocab_size:
            return gathered
        runs = [split(self._vocab_size, size, rank) for rank in range(size)]
        return torch.cat(
            [gathered.narrow(1, rank * longest, stop - start) for rank, (start, stop) in enumerate(runs)], dim=1
        )
