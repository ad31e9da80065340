"""The LoRA delta of a batch whose tokens have different adapters, in two calls: shrink and expand."""

from enum import Enum

import torch
from torch import Tensor

from loraplex_kernels.cpu import lora as _cpu
from loraplex_kernels.reference import lora as _reference


class LoraLayout(Enum):
    """How stacked adapter weights are laid out: for little work, or for much."""

    SMALL = "small"
    LARGE = "large"


def choose_layout(num_tokens: int, rank: int, in_size: int, out_size: int, device: torch.device) -> LoraLayout:
    """Return the layout in which `rank` stacked rows are fastest for that many tokens."""
    is_small = device.type == "cpu" and _cpu.is_small(num_tokens * rank * (in_size + out_size))
    return LoraLayout.SMALL if is_small else LoraLayout.LARGE


def pack_lora(a: Tensor, b: Tensor, layout: LoraLayout) -> tuple[Tensor, Tensor]:
    """Return the stacked weights of several adapters in a layout, for `lora_shrink` and `lora_expand` only.

    a: [R, in], the rows of all adapters; b: [R, out].
    """
    if not a.is_cpu:
        return _reference.pack_lora(a, b)
    return _cpu.pack_small(a, b) if layout is LoraLayout.SMALL else _cpu.pack_large(a, b)


def lora_shrink(x: Tensor, a: Tensor, foreign: Tensor | None) -> Tensor:
    """Project each token onto the ranks of its adapter: out[t, r] = x[t] @ a[r], and 0 where foreign[t, r].

    x: [T, in]; a: from `pack_lora`, R rows; foreign: [T, R] bool, True where rank row r is not of token t's adapter,
    or None where all rows are all tokens' own. Returns [T, R] for `lora_expand`. No value of a foreign row can reach
    the result, not even an infinity.
    """
    return _cpu.lora_shrink(x, a, foreign) if x.is_cpu else _reference.lora_shrink(x, a, foreign)


def lora_expand(h: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """Return out + h @ b; `out` may be changed in place, and may be what is returned.

    h: [T, R] from `lora_shrink`; b: from `pack_lora`; out: [T, out].
    """
    return _cpu.lora_expand(h, b, out) if h.is_cpu else _reference.lora_expand(h, b, out)
