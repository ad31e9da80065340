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
        self._scale = torch.empty(0)
        self._floor = torch.tensor((eps * size) ** 0.5, device=device)

    @property
    def num_bytes(self) -> int:
        """Size of the loaded weight."""
        return self._scale.nbytes

    def load(self, checkpoint: Checkpoint, name: str) -> None:
        """Take the weight of that name from the checkpoint."""
        weight = checkpoint.take(name, (self._size,)).to(self._device, self._dtype)
        self._scale = weight.float() * self._size**0.5

    def forward(self, x: Tensor) -> Tensor:
        """Return x [T, size], normalised."""
        return rms_norm(x, self._scale, self._floor)
