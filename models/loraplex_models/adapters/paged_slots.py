"""Adapter slots on a GPU: each adapter is one block of rank pages in device memory, found through page tables.

`prepare` lays an adapter out in host memory and sends it over in one copy beside the running steps; `install` changes
two rows of tables. Nothing is padded to the largest rank, and the addresses that kernels are given never change, so a
captured graph serves whatever adapters come later. Page tables count from a base tensor to wherever a block lies.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from loraplex_kernels.dispatch import has_gpu_forms
from loraplex_kernels.lora_pages import (
    DECODE_TILE_ROWS,
    PAGE_RANKS,
    PREFILL_TILE_ROWS,
    LinearPages,
    RankPages,
    RowTiles,
    make_tiles,
    write_pages,
)
from loraplex_kernels.streams import new_stream
from loraplex_models.adapters.slots import AdapterSlots, PreparedAdapter
from loraplex_models.adapters.weights import AdapterWeights
from loraplex_models.forward import LoraBatch

if TYPE_CHECKING:
    from loraplex_models.decoder import CausalLM


# By linear and part the rank there, and where its pages start in the adapter's block.
Places = dict[tuple[int, int], tuple[int, list[int]]]


@dataclass(frozen=True, slots=True)
class ArrangedWeights(AdapterWeights):
    """An adapter as its pages will lie on the device, in host memory that a GPU reads at full speed; no modules."""

    block: Tensor = field(kw_only=True)
    places: Places = field(kw_only=True)
    rest: PreparedAdapter = field(kw_only=True)

    @property
    def num_bytes(self) -> int:
        """Memory of the pages and of what stands beside them."""
        return self.block.nbytes + super(ArrangedWeights, self).num_bytes


@dataclass(frozen=True, slots=True)
class PagedAdapter(PreparedAdapter):
    """An adapter's pages on the device."""

    block: Tensor = field(kw_only=True)
    places: Places = field(kw_only=True)


class PagedAdapterSlots(AdapterSlots):
    """Slots for adapters of up to `max_rank`, whose weights are read by kernels through page tables."""

    def __init__(self, model: "CausalLM", num_slots: int, max_rank: int) -> None:
        super().__init__(model, num_slots)
        shapes = [(linear.in_size, tuple(linear.parts.values())) for linear in self._linears]
        self._base = torch.zeros(1, dtype=model.dtype, device=model.device)
        self._rank_pages = RankPages(self._base, shapes, num_slots=num_slots, max_rank=max_rank)
        self.pages: tuple[LinearPages, ...] = tuple(map(self._rank_pages.linear, range(len(shapes))))
        self._sizes = shapes
        self._blocks: dict[int, PagedAdapter] = {}
        self._copies = new_stream(model.device) if model.device.type == "cuda" else None

    def arrange(self, weights: AdapterWeights) -> ArrangedWeights:
        """Check an adapter and lay it out as its pages will lie, for the host tier. Raises ValueError as `prepare`."""
        pairs, rest = self._finish(weights)
        places: Places = {}
        end = 0
        for module, (a, _) in pairs.items():
            index, part = self._places[module]
            in_size, part_sizes = self._sizes[index]
            page_size = PAGE_RANKS * (in_size + part_sizes[part])
            count = -(-len(a) // PAGE_RANKS)
            places[index, part] = (len(a), [end + page * page_size for page in range(count)])
            end += count * page_size
        block = torch.zeros(end, dtype=self._dtype, pin_memory=self._copies is not None)
        for module, (a, b) in pairs.items():
            _, starts = places[self._places[module]]
            size = PAGE_RANKS * (a.shape[1] + len(b))
            pages = block[starts[0] : starts[0] + len(starts) * size].view(len(starts), size)
            write_pages(pages, a.to(self._dtype), b.to(self._dtype))
        return ArrangedWeights(
            weights.digest, weights.rank, {}, weights.parts, weights.ends, block=block, places=places, rest=rest
        )

    def prepare(self, weights: AdapterWeights) -> PagedAdapter:
        """Bring an adapter to the device beside the steps, in one copy; any thread may call it.

        What `arrange` gave is only copied. Raises ValueError as the CPU's slots do.
        """
        arranged = weights if isinstance(weights, ArrangedWeights) else self.arrange(weights)
        rest = arranged.rest
        return PagedAdapter(
            (), rest.changes, rest.embedding, rest.head, block=self._send(arranged.block), places=arranged.places
        )

    def install(self, slot: int, adapter: PreparedAdapter) -> None:
        """Put an adapter into a slot, in place of what was there; no weight is copied."""
        assert isinstance(adapter, PagedAdapter), "prepared by other slots"
        super().install(slot, adapter)
        distance = adapter.block.data_ptr() - self._base.data_ptr()
        assert distance % self._dtype.itemsize == 0, "device memory is not aligned"
        first = distance // self._dtype.itemsize
        self._rank_pages.put(
            slot,
            {place: (rank, [first + start for start in starts]) for place, (rank, starts) in adapter.places.items()},
        )
        self._blocks[slot] = adapter

    def clear(self, slot: int) -> None:
        """Empty a slot."""
        super().clear(slot)
        adapter = self._blocks.pop(slot, None)
        if adapter is not None:
            self._rank_pages.clear(slot)
            if self._copies is not None:
                # Steps that are under way may still read it: its memory is free for other copies after them.
                adapter.block.record_stream(torch.cuda.current_stream())

    def route(self, segment_start: Sequence[int], segment_slots: Sequence[int]) -> LoraBatch | None:
        """Say how the step's tokens reach their adapters; None when no token has one."""
        longest = max((end - start for start, end in pairwise(segment_start)), default=0)
        tile_rows = DECODE_TILE_ROWS if longest <= DECODE_TILE_ROWS else PREFILL_TILE_ROWS
        tiles = make_tiles(segment_start, segment_slots, tile_rows, self._device)
        return self.route_tiles(segment_start, segment_slots, tiles)

    def route_tiles(
        self, segment_start: Sequence[int], segment_slots: Sequence[int], tiles: RowTiles
    ) -> LoraBatch | None:
        """As `route`, with the tiles of these segments already on the device."""
        batch = super().route(segment_start, segment_slots)
        return None if batch is None else replace(batch, tiles=tiles, pages=self.pages_of(set(segment_slots)))

    def pages_of(self, slots: set[int]) -> tuple[LinearPages | None, ...]:
        """Each linear's pages, by its index; None where no adapter of these slots touches it."""
        touched = {index for slot in slots if slot in self._blocks for index, _ in self._blocks[slot].places}
        return tuple(pages if index in touched else None for index, pages in enumerate(self.pages))

    def _send(self, host: Tensor) -> Tensor:
        if self._copies is None:
            return host.to(self._device)
        with torch.cuda.stream(self._copies):
            block = host.to(self._device, non_blocking=True)
        self._copies.synchronize()
        return block


def make_slots(model: "CausalLM", num_slots: int, max_rank: int) -> AdapterSlots:
    """The slots of the device that the model is on."""
    if has_gpu_forms(model.device):
        return PagedAdapterSlots(model, num_slots, max_rank)
    return AdapterSlots(model, num_slots)
