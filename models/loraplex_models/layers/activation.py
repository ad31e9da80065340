"""The gated activations, by their name in a config.json."""

from collections.abc import Callable

from torch import Tensor

from loraplex_kernels.activation import silu_and_mul

GATED_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": silu_and_mul, "swish": silu_and_mul}
