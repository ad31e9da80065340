"""How a kernel that reads a linear's output adds the delta of the row's adapter."""

from typing import TYPE_CHECKING

import triton
import triton.language as tl
from torch import Tensor

if TYPE_CHECKING:
    from loraplex_kernels.lora_pages import RowDelta


# Where these start differs from linear to linear, and must not decide which code reads them.
TABLES = ("row_slots", "ranks")


@triton.jit
def rank_of(row_slots, ranks, rank_stride, row, part):
    """The rank of the row's adapter in a part of the linear; 0: nothing is to be added."""
    slot = tl.load(row_slots + row).to(tl.int64)
    return tl.load(ranks + tl.maximum(slot, 0) * rank_stride + part, mask=slot >= 0, other=0)


def delta_arguments(delta: "RowDelta | None", stand_in: Tensor) -> tuple[Tensor, Tensor, Tensor, int]:
    """Delta, the rows' slots, the ranks and their stride; where there is no delta a tensor that nobody reads."""
    if delta is None:
        return stand_in, stand_in, stand_in, 0
    return delta.values, delta.tiles.row_slots, delta.pages.ranks, delta.pages.ranks.stride(0)
