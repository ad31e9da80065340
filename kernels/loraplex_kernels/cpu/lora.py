"""The LoRA delta as two dense products over all adapters of the batch: no loop over tokens or adapters.

Two layouts. oneDNN's packed products cost some ten microseconds each before they compute anything, so little work goes
to plain float32 products instead (measured on 135M-parameter shapes: 7 instead of 23 us a linear for one token of one
adapter); from about half a million multiplications on, the packed form in the model's dtype wins.
"""

import torch
from torch import Tensor

from loraplex_kernels.cpu.linear import is_packable, linear, pack_weight

MAX_SMALL_PRODUCTS = 500_000


def is_small(num_products: int) -> bool:
    """Whether that many multiplications are faster in the small layout."""
    return num_products <= MAX_SMALL_PRODUCTS


def pack_small(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Plain float32; `a` as the product wants it, [in, R]."""
    return a.float().t(), b.float()


def pack_large(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Packed in the model's dtype; small where the processor has no packed form of it."""
    return (pack_weight(a), pack_weight(b.t())) if is_packable(a.dtype) else pack_small(a, b)


def lora_shrink(x: Tensor, a: Tensor, foreign: Tensor | None) -> Tensor:
    h = linear(x, a) if a.is_mkldnn else torch.mm(x.float(), a)
    return h if foreign is None else h.masked_fill_(foreign, 0)


def lora_expand(h: Tensor, b: Tensor, out: Tensor) -> Tensor:
    return linear(h, b, None, out) if b.is_mkldnn else out.add_(torch.mm(h, b))
