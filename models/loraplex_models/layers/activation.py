"""The activations, gated and plain, by their name in a config.json."""

from collections.abc import Callable

from torch import Tensor

from loraplex_kernels.activation import gelu, gelu_and_mul, gelu_tanh, gelu_tanh_and_mul, silu, silu_and_mul

GATED_ACTIVATIONS: dict[str, Callable[..., Tensor]] = {
    "silu": silu_and_mul,
    "swish": silu_and_mul,
    "gelu_pytorch_tanh": gelu_tanh_and_mul,
    "gelu_new": gelu_tanh_and_mul,
    "gelu": gelu_and_mul,
}
ACTIVATIONS: dict[str, Callable[..., Tensor]] = {
    "silu": silu,
    "swish": silu,
    "gelu_pytorch_tanh": gelu_tanh,
    "gelu_new": gelu_tanh,
    "gelu": gelu,
}
