"""RMSNorm as a layer."""

import torch
import torch.nn.functional as F
from torch import Tensor

from loraplex_kernels.lora_pages import RowDelta
from loraplex_kernels.norm import add_rms_norm, rms_norm
from loraplex_models.checkpoint import Checkpoint


class RMSNorm:
    """Scale each row to unit root mean square, then by a learned weight."""

    def __init__(self, size: int, eps: float, dtype: torch.dtype, device: torch.device) -> None:
        self._size = size
        self._dtype = dtype
        self._device = device
        self._eps = eps
        self._weight = torch.empty(0)

    @property
    def num_bytes(self) -> int:
        """Size of the loaded weight."""
        return self._weight.nbytes

    def load(self, checkpoint: Checkpoint, name: str) -> None:
        """Take the weight of that name from the checkpoint."""
        self._weight = checkpoint.take(name, (self._size,)).to(self._device, self._dtype, copy=True)

    def forward(self, x: Tensor) -> Tensor:
        """Return x [T, size], normalised."""
        return rms_norm(x, self._weight, self._eps)

    def forward_added(self, x: Tensor, residual: Tensor, delta: RowDelta | None) -> Tensor:
        """Add x and its delta to `residual` in place, and return that normalised; all [T, size]."""
        return add_rms_norm(x, residual, self._weight, self._eps, delta)


class OffsetRMSNorm(RMSNorm):
    """RMSNorm whose stored weight is what it has more than one."""

    def load(self, checkpoint: Checkpoint, name: str) -> None:
        """Take the weight of that name from the checkpoint; one is added in float32."""
        weight = checkpoint.take(name, (self._size,)).float() + 1.0
        self._weight = weight.to(self._device, self._dtype)


class LayerNorm(RMSNorm):
    """Take the mean off each row first."""

    def forward(self, x: Tensor) -> Tensor:
        """Return x [T, size], normalised."""
        return F.layer_norm(x, (self._size,), self._weight, None, self._eps)


class BiasedLayerNorm(LayerNorm):
    """LayerNorm with a bias."""

    _bias = torch.empty(0)

    @property
    def num_bytes(self) -> int:
        """Size of the loaded weight and bias."""
        return self._weight.nbytes + self._bias.nbytes

    def load(self, checkpoint: Checkpoint, name: str) -> None:
        """Take the weight of that name, and the bias beside it, from the checkpoint."""
        super().load(checkpoint, name)
        bias = checkpoint.take(f"{name.removesuffix('weight')}bias", (self._size,))
        self._bias = bias.to(self._device, self._dtype, copy=True)

    def forward(self, x: Tensor) -> Tensor:
        """Return x [T, size], normalised."""
        return F.layer_norm(x, (self._size,), self._weight, self._bias, self._eps)
