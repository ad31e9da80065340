"""The norms of hidden states as layers."""

import torch
import torch.nn.functional as F
from torch import Tensor

from loraplex_kernels.lora_pages import RowDelta
from loraplex_kernels.norm import Norm, add_norm, rms_norm
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

    def kernel_form(self) -> Norm | None:
        """The norm as kernels take it; None where it leaves rows as they are."""
        return Norm(self._weight, self._eps)


class OffsetRMSNorm(RMSNorm):
    """RMSNorm whose stored weight is what it has more than one."""

    def load(self, checkpoint: Checkpoint, name: str) -> None:
        """Take the weight of that name from the checkpoint; one is added in float32."""
        weight = checkpoint.take(name, (self._size,)).float() + 1.0
        self._weight = weight.to(self._device, self._dtype)


class NoNorm(RMSNorm):
    """Leaves rows as they are, where a family has no norm and others have one."""

    def load(self, checkpoint: Checkpoint, name: str) -> None:
        """Take nothing."""

    def kernel_form(self) -> None:
        """Nothing."""

    def forward(self, x: Tensor) -> Tensor:
        """Return x."""
        return x


class LayerNorm(RMSNorm):
    """Take the mean off each row first."""

    def kernel_form(self) -> Norm:
        """The norm as kernels take it."""
        return Norm(self._weight, self._eps, is_centred=True)

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

    def kernel_form(self) -> Norm:
        """The norm as kernels take it."""
        return Norm(self._weight, self._eps, self._bias, is_centred=True)

    def forward(self, x: Tensor) -> Tensor:
        """Return x [T, size], normalised."""
        return F.layer_norm(x, (self._size,), self._weight, self._bias, self._eps)


def add_and_norm(
    x: Tensor, residual: Tensor, delta: RowDelta | None, norm: RMSNorm | None,
    after: RMSNorm | None = None, share: float = 1.0,
) -> Tensor:  # fmt: skip
    """Add a share of x and its delta, normalised by `after` where given, to `residual` in place; all [T, size].

    Returns what `norm` makes of the residual, or the residual itself without one.
    """
    return add_norm(
        x, residual, None if norm is None else norm.kernel_form(), delta,
        None if after is None else after.kernel_form(), share,
    )  # fmt: skip
