"""The LoRA delta over rank pages in plain torch, one row and one part at a time."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from loraplex_kernels.lora_pages import LinearPages, RowDelta, RowTiles

PAGE_RANKS = 8


def shrink_rows(x: Tensor, pages: "LinearPages", tiles: "RowTiles") -> Tensor:
    h = torch.zeros(1, len(x), len(pages.part_sizes), pages.max_rank, device=x.device)
    for row, part, slot, rank in _rows(pages, tiles):
        a, _ = module_weights(pages, slot, part, rank)
        h[0, row, part, :rank] = a @ x[row].float()
    return h


def expand_rows(h: Tensor, pages: "LinearPages", tiles: "RowTiles", delta: Tensor) -> None:
    borders = pages.borders.tolist()
    for row, part, slot, rank in _rows(pages, tiles):
        _, b = module_weights(pages, slot, part, rank)
        total = b @ h.sum(0)[row, part, :rank]
        delta[row, borders[part] : borders[part + 1]] = total.to(delta.dtype)


def add_rows(out: Tensor, delta: "RowDelta") -> None:
    out.copy_(with_delta(out, delta))


def with_delta(out: Tensor, delta: "RowDelta | None") -> Tensor:
    """The output of a linear with its delta: in float32 where there is one, else as it is."""
    if delta is None:
        return out
    slots = delta.tiles.row_slots
    is_touched = (delta.pages.ranks[slots.long()] > 0) & (slots >= 0).unsqueeze(1)
    wide = is_touched.repeat_interleave(delta.pages.borders.diff().long(), 1)
    return out.float() + torch.where(wide, delta.values.float(), 0.0)


def module_weights(pages: "LinearPages", slot: int, part: int, rank: int) -> tuple[Tensor, Tensor]:
    """A [rank, in] and B [out, rank] of one module, in float32."""
    in_size, out_size = pages.in_size, pages.part_sizes[part]
    a, b = [], []
    for r in range(rank):
        start = int(pages.page_table[slot, part, r // PAGE_RANKS])
        a_start = start + r % PAGE_RANKS * in_size
        b_start = start + PAGE_RANKS * in_size + r % PAGE_RANKS * out_size
        a.append(pages.cells[a_start : a_start + in_size])
        b.append(pages.cells[b_start : b_start + out_size])
    return torch.stack(a).float(), torch.stack(b, 1).float()


def _rows(pages: "LinearPages", tiles: "RowTiles") -> Iterator[tuple[int, int, int, int]]:
    """Each row that has an adapter, with each part that it touches, the adapter's slot, and its rank there."""
    for row, slot in enumerate(tiles.row_slots.tolist()):
        for part, rank in enumerate(pages.ranks[slot].tolist() if slot >= 0 else []):
            if rank:
                yield row, part, slot, rank
