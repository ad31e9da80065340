"""Plain weights in the model's own dtype: the simplest way to keep a linear, and the pattern for the others."""

from collections.abc import Sequence

import torch
from torch import Tensor

from loraplex_kernels.linear import linear, pack_weight, unpack_weight, wide_linear
from loraplex_kernels.lora import Deltas
from loraplex_quant.grouped import plain
from loraplex_quant.method import ALL_ROWS, LinearWeight


class Unquantized:
    """The weights of the fused linears, one below the other, packed for the device. See `QuantMethod`."""

    def __init__(
        self, parts: Sequence[LinearWeight], dtype: torch.dtype, device: torch.device, *, may_share: bool = False
    ) -> None:
        """Stack and pack; of tensors that lie in a file's memory nothing is kept, unless `may_share`."""
        weight = stack([plain(part.weight) for part in parts], dtype, device)
        packed = pack_weight(weight)
        is_shared = packed is parts[0].weight and may_share
        # A weight that stayed plain must not keep the checkpoint's mapped file alive.
        self._weight = weight.clone() if packed is weight and len(parts) == 1 and not is_shared else packed
        self.num_bytes = 0 if is_shared else weight.nbytes
        self.bias = stacked_bias(parts, dtype, device)
        if self.bias is not None:
            self.num_bytes += self.bias.nbytes

    def apply(self, x: Tensor, addend: Tensor | None = None, deltas: Deltas | None = None) -> Tensor:
        """Return x @ weight.T + bias + addend + deltas."""
        return linear(x, self._weight, self.bias, addend, deltas)

    def logits(self, x: Tensor) -> Tensor:
        """Return x @ weight.T + bias in float32."""
        return wide_linear(x, self._weight, self.bias)

    def dequantize(self, rows: slice = ALL_ROWS) -> Tensor:
        """Return the weight, or some rows, in float32."""
        return unpack_weight(self._weight)[rows].to(torch.float32, copy=True)


def stack(tensors: Sequence[Tensor], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the tensors one below the other; a single one may come back as it is."""
    moved = [tensor.to(device, dtype) for tensor in tensors]
    return moved[0] if len(moved) == 1 else torch.cat(moved)


def stacked_bias(parts: Sequence[LinearWeight], dtype: torch.dtype, device: torch.device) -> Tensor | None:
    """Return the biases of fused linears one after the other, None where none has one."""
    if all(part.bias is None for part in parts):
        return None
    # A quantised checkpoint may hold a bias that the config does not name, and for some of the linears only.
    biases = [torch.zeros(part.weight.shape[0]) if part.bias is None else part.bias for part in parts]
    return stack(biases, dtype, device).clone()
