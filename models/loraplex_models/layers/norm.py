"""RMSNorm as a layer."""

import torch
from torch import Tensor

from loraplex_kernels.norm import rms_norm
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
