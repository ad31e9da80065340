"""What a weight format must be able to do."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


class QuantFormatError(ValueError):
    """The stored tensors of a linear do not fit their format; the message says how."""


@dataclass(frozen=True, slots=True)
class ParamSpec:
    """One tensor that a linear layer has in the checkpoint, under `<module>.<suffix>`."""

    suffix: str
    shape: tuple[int, ...]
    dtype: torch.dtype


class QuantMethod(Protocol):
    """How one linear layer's weight is stored and applied. An instance serves one layer and holds its weight.

    Call `create_weights` for each linear of the checkpoint that the layer fuses, then `finish_load` once, then `apply`.
    """

    num_bytes: int  # of the loaded weight; 0 before finish_load

    def create_weights(self, in_size: int, out_size: int) -> tuple[ParamSpec, ...]:
        """Name the tensors of one linear [out_size, in_size]."""
        ...

    def finish_load(self, parts: Sequence[Mapping[str, Tensor]]) -> None:
        """Take the tensors of the fused linears, by suffix and in order, and keep them in the form that `apply` reads.

        The tensors may lie in a file's memory; nothing of them is kept unless it is copied.
        """
        ...

    def apply(self, x: Tensor, addend: Tensor | None = None) -> Tensor:
        """Return x @ weight.T, plus the bias where there is one, plus `addend` where it is given."""
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

    def dequantize(self, stored: StoredLinear, in_size: int, out_size: int) -> Tensor:
        """Return the weight [out_size, in_size] in float32, in memory of its own.

        Raises QuantFormatError.
        """
        ...
