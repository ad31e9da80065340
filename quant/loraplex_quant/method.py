"""What a weight format must be able to do."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from loraplex_kernels.lora import Deltas
from loraplex_quant.grouped import GroupedWeight

ALL_ROWS = slice(None)
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


class QuantFormatError(ValueError):
    """The stored tensors of a linear do not fit their format; the message says how."""


@dataclass(frozen=True, slots=True)
class LinearWeight:
    """One linear of a checkpoint: its weight [out, in], plain or in groups, and its bias [out] where it has one."""

    weight: Tensor | GroupedWeight
    bias: Tensor | None = None


class QuantMethod(Protocol):
    """How one linear layer's weight is kept and applied. An instance holds the weight of one layer."""

    num_bytes: int  # of weight and bias as they are kept
    bias: Tensor | None  # [out], in the type of activations

    def apply(self, x: Tensor, addend: Tensor | None = None, deltas: Deltas | None = None) -> Tensor:
        """Return x @ weight.T, plus the bias where there is one, plus `addend` and the adapters' deltas where given."""
        ...

    def logits(self, x: Tensor) -> Tensor:
        """Return x @ weight.T + bias in float32, as little rounded as the kernel can."""
        ...

    def dequantize(self, rows: slice = ALL_ROWS) -> Tensor:
        """Return the weight [out, in], or some rows, as plain float32 in memory of its own; not for every step."""
        ...


class StoredLinear(Protocol):
    """The tensors of one linear in a checkpoint, by suffix."""

    def __contains__(self, suffix: str) -> bool:
        """Whether the checkpoint has that tensor."""
        ...

    def take(self, suffix: str, shape: tuple[int, ...] | None, dtypes: tuple[torch.dtype, ...]) -> Tensor:
        """Return the tensor, which must have that shape, where one is given, and one of those dtypes."""
        ...


class WeightFormat(Protocol):
    """How a checkpoint stores its quantised linears. One instance reads all of them."""

    def is_quantized(self, stored: StoredLinear) -> bool:
        """Whether this linear is stored in the format, or plainly as a writer leaves some modules."""
        ...

    def read(self, stored: StoredLinear, in_size: int, out_size: int) -> Tensor | GroupedWeight:
        """Return the weight [out_size, in_size]: in groups where the format has such, else in float32.

        It lies in memory of its own. Raises QuantFormatError.
        """
        ...
