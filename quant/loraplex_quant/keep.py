"""In which form the weight of a linear is kept, once it has been read."""

from collections.abc import Sequence

import torch

from loraplex_quant.method import LinearWeight, QuantMethod
from loraplex_quant.unquantized import Unquantized


def keep_linear(parts: Sequence[LinearWeight], dtype: torch.dtype, device: torch.device) -> QuantMethod:
    """Keep the weights of linears that read the same input, their outputs side by side, ready to compute in `dtype`."""
    return Unquantized(parts, dtype, device)
