"""Norms of queries and keys, between their projection and their turning."""

import torch
from torch import Tensor

from loraplex_kernels.kv_cache import HeadNorms
from loraplex_kernels.norm import rms_norm_groups
from loraplex_models.checkpoint import Checkpoint


class QKNorm:
    """RMSNorm over the queries and over the keys of each token: head by head, or over all heads together."""

    def __init__(
        self, query_size: int, kv_size: int, head_dim: int | None, eps: float, dtype: torch.dtype, device: torch.device
    ) -> None:
        """With `head_dim` each head is normalised alone, by one weight of that size for all; else all heads at once."""
        self._sizes = (query_size, kv_size)
        self._head_dim = head_dim
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
            (checkpoint.take(f"{prefix}.{name}.weight", (self._head_dim or size,)).float() + offset)
            .to(self._device, self._dtype)
            .repeat(size // (self._head_dim or size))
            for name, size in zip(("q_norm", "k_norm"), self._sizes, strict=True)
        )
        self._weights = query, key

    def of_heads(self) -> HeadNorms:
        """Return the norms as the kernel that turns heads takes them; only where each head is normalised alone."""
        return HeadNorms(*self._weights, self._eps)

    def apply(self, qkv: Tensor) -> None:
        """Normalise queries and keys in place. qkv: [T, queries | keys | values]."""
        query_size, kv_size = self._sizes
        query_weight, key_weight = self._weights
        queries, keys = qkv.narrow(1, 0, query_size), qkv.narrow(1, query_size, kv_size)
        rms_norm_groups(queries, query_weight, self._head_dim or query_size, self._eps)
        rms_norm_groups(keys, key_weight, self._head_dim or kv_size, self._eps)
