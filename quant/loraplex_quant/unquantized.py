"""Plain weights: the smallest weight format, and the pattern for the others."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from loraplex_kernels.linear import linear, pack_weight
from loraplex_quant.method import ParamSpec


class Unquantized:
    """A weight in the model's own dtype, packed for the device. See `QuantMethod`."""

    def __init__(self, dtype: torch.dtype, device: torch.device, has_bias: bool) -> None:
        self.num_bytes = 0
        self._dtype = dtype
        self._device = device
        self._has_bias = has_bias
        self._weight = torch.empty(0)
        self._bias: Tensor | None = None

    def create_weights(self, in_size: int, out_size: int) -> tuple[ParamSpec, ...]:
        """Name the weight, and the bias where there is one."""
        weight = ParamSpec("weight", (out_size, in_size), self._dtype)
        bias = ParamSpec("bias", (out_size,), self._dtype)
        return (weight, bias) if self._has_bias else (weight,)

    def finish_load(self, parts: Sequence[Mapping[str, Tensor]]) -> None:
        """Stack the weights of the fused linears and pack them."""
        weight = self._stack([part["weight"] for part in parts])
        self.num_bytes = weight.nbytes
        packed = pack_weight(weight)
        # A weight that stayed plain must not keep the checkpoint's mapped file alive.
        self._weight = packed.clone() if packed is weight and len(parts) == 1 else packed
        # A quantised checkpoint may hold a bias that the config does not name, and for some of the linears only.
        if any("bias" in part for part in parts):
            biases = [part["bias"] if "bias" in part else torch.zeros(len(part["weight"])) for part in parts]
            self._bias = self._stack(biases).clone()
            self.num_bytes += self._bias.nbytes

    def apply(self, x: Tensor, addend: Tensor | None = None) -> Tensor:
        """Return x @ weight.T + bias + addend."""
        return linear(x, self._weight, self._bias, addend)

    def _stack(self, tensors: Sequence[Tensor]) -> Tensor:
        moved = [tensor.to(self._device, self._dtype) for tensor in tensors]
        return moved[0] if len(moved) == 1 else torch.cat(moved)
