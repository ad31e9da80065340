"""The LoRA delta as two dense products over all adapters of the batch: no loop over tokens or adapters."""

from torch import Tensor

from loraplex_kernels.cpu.linear import linear, pack_weight
from loraplex_kernels.reference import linear as _plain


def pack_lora(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    return pack_weight(a), pack_weight(b.t())


def lora_shrink(x: Tensor, a: Tensor, foreign: Tensor | None) -> Tensor:
    h = linear(x, a) if a.is_mkldnn else _plain.linear(x, a)
    return h if foreign is None else h.masked_fill_(foreign, 0)


def lora_expand(h: Tensor, b: Tensor, out: Tensor) -> Tensor:
    return linear(h, b, None, out) if b.is_mkldnn else _plain.linear(h, b, None, out)
