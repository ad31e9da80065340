"""The LoRA delta over rank pages in plain torch, one row and one part at a time."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from loraplex_kernels.lora_pages import LayerPages, RowTiles


def shrink_rows(x: Tensor, pages: "LayerPages", tiles: "RowTiles") -> Tensor:
    h = torch.zeros(1, len(x), len(pages.part_sizes), pages.max_rank, device=x.device)
    for row, part, ranks in _rows(pages, tiles):
        a = pages.a[_page_of(ranks, row, pages, tiles), part, ranks % pages.a.shape[2]]
        h[0, row, part, : len(ranks)] = a.float() @ x[row].float()
    return h


def expand_rows(h: Tensor, pages: "LayerPages", tiles: "RowTiles", delta: Tensor) -> None:
    borders = pages.columns.tolist()
    for row, part, ranks in _rows(pages, tiles):
        b = pages.b[_page_of(ranks, row, pages, tiles), ranks % pages.b.shape[1]]
        columns = slice(borders[part], borders[part + 1])
        delta[row, columns] = (h.sum(0)[row, part, : len(ranks)] @ b[:, columns].float()).to(delta.dtype)


def add_rows(out: Tensor, delta: Tensor, pages: "LayerPages", tiles: "RowTiles") -> None:
    out.add_(torch.where(touched(pages, tiles), delta, 0))


def touched(pages: "LayerPages", tiles: "RowTiles") -> Tensor:
    """Which cells of the output have a delta, [T, sum of part_sizes] bool."""
    ranks = pages.ranks[tiles.row_slots.long()] * (tiles.row_slots >= 0).unsqueeze(1)
    return (ranks > 0).repeat_interleave(pages.columns.diff().long(), 1)


def _rows(pages: "LayerPages", tiles: "RowTiles") -> Iterator[tuple[int, int, Tensor]]:
    """Each row that has an adapter, with each part that it touches and that part's ranks, counted from 0."""
    for row, slot in enumerate(tiles.row_slots.tolist()):
        for part, rank in enumerate(pages.ranks[slot].tolist() if slot >= 0 else []):
            if rank:
                yield row, part, torch.arange(rank, device=pages.a.device)


def _page_of(ranks: Tensor, row: int, pages: "LayerPages", tiles: "RowTiles") -> Tensor:
    return pages.page_table[tiles.row_slots[row], ranks // pages.a.shape[2]].long()
