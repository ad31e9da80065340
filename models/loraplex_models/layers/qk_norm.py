"""Norms of queries and keys, between their projection and their turning."""

import torch
from torch import Tensor

from loraplex_kernels.kv_cache import HeadNorms
from loraplex_kernels.lora_pages import RowDelta
from loraplex_kernels.norm import head_squares, rms_norm_groups
from loraplex_models.checkpoint import Checkpoint, take_part
from loraplex_models.cuts import Cut
from loraplex_models.parallel import ParallelGroup


class QKNorm:
    """RMSNorm over the queries and over the keys of each token, each head alone, by one weight for all."""

    def __init__(
        self, query_size: int, kv_size: int, head_dim: int, eps: float, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._sizes = (query_size, kv_size)
        self._group_sizes = (head_dim, head_dim)
        self._eps = eps
        self._dtype = dtype
        self._device = device
        self._weights = (torch.empty(0), torch.empty(0))

    @property
    def num_bytes(self) -> int:
        """Size of the weights as they are kept."""
        return sum(weight.nbytes for weight in self._weights)

    def load(self, checkpoint: Checkpoint, prefix: str, offset: float = 0.0) -> None:
        """Take `<prefix>.q_norm.weight` and `<prefix>.k_norm.weight` from the checkpoint, and add `offset`."""
        query, key = (
            (checkpoint.take(f"{prefix}.{name}.weight", (head_dim,)).float() + offset)
            .to(self._device, self._dtype)
            .repeat(size // head_dim)
            for name, size, head_dim in zip(("q_norm", "k_norm"), self._sizes, self._group_sizes, strict=True)
        )
        self._weights = query, key

    def of_heads(self) -> HeadNorms:
        """Return the norms as the kernel that turns heads takes them."""
        return HeadNorms(*self._weights, self._eps)

    def apply(self, qkv: Tensor) -> None:
        """Normalise queries and keys in place. qkv: [T, queries | keys | values]."""
        query_size, kv_size = self._sizes
        query_weight, key_weight = self._weights
        query_group, key_group = self._group_sizes
        queries, keys = qkv.narrow(1, 0, query_size), qkv.narrow(1, query_size, kv_size)
        rms_norm_groups(queries, query_weight, query_group, self._eps)
        rms_norm_groups(keys, key_weight, key_group, self._eps)


class WholeQKNorm(QKNorm):
    """RMSNorm over all query heads together, those of other ranks too, and over all key heads together.

    A rank has the weights of its own heads. Where several ranks have the same key head, the first of them counts it.
    """

    def __init__(
        self, query_size: int, kv_size: int, eps: float, dtype: torch.dtype, device: torch.device, group: ParallelGroup
    ) -> None:
        super().__init__(query_size, kv_size, query_size, eps, dtype, device)
        self._group_sizes = (query_size, kv_size)
        self._group = group
        self._widths = self._sizes
        self._counts_keys = True

    def load(self, checkpoint: Checkpoint, prefix: str, offset: float = 0.0) -> None:
        """Take this rank's part of both weights from the checkpoint, and add `offset`."""
        part = checkpoint.part
        if part is None or part.size == 1:
            super().load(checkpoint, prefix, offset)
            return
        cuts = part.queries, part.keys
        query, key = (
            (self._taken(checkpoint, f"{prefix}.{name}.weight", cut) + offset).to(self._device, self._dtype)
            for name, cut in zip(("q_norm", "k_norm"), cuts, strict=True)
        )
        self._weights = query, key
        self._widths = part.queries.size, part.keys.size
        self._counts_keys = part.is_first_with_keys

    def _taken(self, checkpoint: Checkpoint, name: str, cut: Cut) -> Tensor:
        return take_part(checkpoint.take(name, (cut.size,)), cut).float()

    def of_all(self, qkv: Tensor, delta: RowDelta | None) -> HeadNorms:
        """Return the norms as the kernel that turns heads takes them, for these queries and keys with their delta."""
        squares = head_squares(qkv, self._sizes, delta)
        if not self._counts_keys:
            squares[:, 1].zero_()
        return HeadNorms(*self._weights, self._eps, self._group.all_reduce(squares), self._widths)

    def apply(self, qkv: Tensor) -> None:
        """Normalise queries and keys in place. qkv: [T, queries | keys | values]."""
        if self._group.size == 1:
            super().apply(qkv)
            return
        norms = self.of_all(qkv, None)
        assert norms.squares is not None
        start = 0
        for kind, (size, width, weight) in enumerate(zip(self._sizes, self._widths, self._weights, strict=True)):
            scale = (norms.squares[:, kind : kind + 1] / width + self._eps).rsqrt()
            numbers = qkv.narrow(1, start, size)
            numbers.copy_(numbers.float() * scale * weight.float())
            start += size
