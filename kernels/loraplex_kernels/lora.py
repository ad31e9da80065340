"""The LoRA delta of a batch whose tokens have different adapters, in two calls: shrink and expand."""

from torch import Tensor

from loraplex_kernels.cpu import lora as _cpu
from loraplex_kernels.reference import lora as _reference


def pack_lora(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return the stacked weights of several adapters in the layout that shrink and expand read fastest.

    a: [R, in], the rows of all adapters; b: [R, out]. What comes back is for `lora_shrink` and `lora_expand` only.
    """
    return _cpu.pack_lora(a, b) if a.is_cpu else _reference.pack_lora(a, b)


def lora_shrink(x: Tensor, a: Tensor, foreign: Tensor | None) -> Tensor:
    """Project each token onto the ranks of its adapter: out[t, r] = x[t] @ a[r], and 0 where foreign[t, r].

    x: [T, in]; a: from `pack_lora`, R rows; foreign: [T, R] bool, True where rank row r is not of token t's adapter,
    or None where all rows are all tokens' own. Returns [T, R]. No value of a foreign row can reach the result,
    not even an infinity.
    """
    return _cpu.lora_shrink(x, a, foreign) if x.is_cpu else _reference.lora_shrink(x, a, foreign)


def lora_expand(h: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """Return out + h @ b; `out` may be changed in place.

    h: [T, R] from `lora_shrink`; b: from `pack_lora`; out: [T, out].
    """
    return _cpu.lora_expand(h, b, out) if h.is_cpu else _reference.lora_expand(h, b, out)
