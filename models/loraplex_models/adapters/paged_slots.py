"""Adapter slots on a GPU: each adapter lies in frames of one device memory, its rank pages found through page tables.

`arrange` lays an adapter out in frames of the host's arena; `prepare` takes as many of the device's and has the copies
run beside the steps; `install` changes two rows of tables. Nothing is padded to the largest rank, and the addresses
that kernels are given never change, so a captured graph serves whatever adapters come later. Frames of either side
are written again only after the last copy or step that reads them.
"""

from collections.abc import Sequence, Set
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from loraplex_kernels.copies import Copies, Fence, make_copies
from loraplex_kernels.dispatch import has_gpu_forms
from loraplex_kernels.lora_pages import (
    DECODE_TILE_ROWS,
    PAGE_RANKS,
    PREFILL_TILE_ROWS,
    LinearPages,
    RankPages,
    RowTiles,
    TableRows,
    make_tiles,
    write_pages,
)
from loraplex_models.adapters.arena import Arena, Block, own_block, pairs_of, wait_for
from loraplex_models.adapters.frames import Layout, Place, pack
from loraplex_models.adapters.packed import dense, map_tensors
from loraplex_models.adapters.slots import AdapterSlots, PreparedAdapter
from loraplex_models.adapters.weights import AdapterWeights
from loraplex_models.forward import LoraBatch
from loraplex_models.host_memory import host_memory

if TYPE_CHECKING:
    from loraplex_models.decoder import CausalLM

# A frame is as long as so many of the model's largest pages: few copies, and little left empty by the smaller pages.
PAGES_IN_FRAME = 4
# What frames and pieces in them begin with a multiple of, in bytes: memory is read fastest so.
ALIGNMENT = 256

# By linear, part, and expert where the linear is one of experts (else 0): the rank there, and where its pages are.
Module = tuple[int, int, int]
Places = dict[Module, tuple[int, list[Place]]]


@dataclass(frozen=True, slots=True)
class AdapterRoom:
    """What adapters may take, in bytes: of pinned host memory, and of the device's; None: the widest in each slot."""

    host_bytes: int = 0
    device_bytes: int | None = None


DEFAULT_ROOM = AdapterRoom()


@dataclass(frozen=True, slots=True)
class ArrangedWeights(AdapterWeights):
    """An adapter in frames of host memory, as it will lie on the device; no modules."""

    layout: Layout = field(kw_only=True)
    block: Block = field(kw_only=True)
    places: Places = field(kw_only=True)
    rest: PreparedAdapter = field(kw_only=True)  # what it has beside pages: shapes without memory
    rest_places: list[Place] = field(kw_only=True)

    @property
    def num_bytes(self) -> int:
        """Memory of the frames."""
        return self.block.nbytes

    @property
    def device_bytes(self) -> int:
        """What it takes on the device: as many frames."""
        return self.block.nbytes


@dataclass(frozen=True, slots=True)
class PagedAdapter(PreparedAdapter):
    """An adapter in frames of the device's memory, or on its way there."""

    block: Block = field(kw_only=True)
    places: Places = field(kw_only=True)
    rows: TableRows = field(kw_only=True)
    expert_rows: TableRows | None = field(kw_only=True)  # of experts, where it changes any
    arrival: Fence = field(kw_only=True)

    def has_arrived(self) -> bool:
        """Whether its copies are done; never waits."""
        return self.arrival.query()


@dataclass(frozen=True, slots=True)
class _Resident:
    """An adapter in a slot. The rows that were copied into the tables go back to torch's pinned memory at once."""

    block: Block
    linears: frozenset[int]  # that it touches, by index
    has_experts: bool


class PagedAdapterSlots(AdapterSlots):
    """Slots for adapters of up to `max_rank`, whose weights are read by kernels through page tables."""

    def __init__(
        self,
        model: "CausalLM",
        num_slots: int,
        max_rank: int,
        room: AdapterRoom = DEFAULT_ROOM,
        copies: Copies | None = None,
    ) -> None:
        super().__init__(model, num_slots)
        experts = model.config.experts
        self._num_linears = len(self._linears)
        self._routers = model.routers
        self._num_experts = experts.num_experts if experts is not None and model.expert_linears else 0
        shapes = [(linear.in_size, tuple(linear.parts.values())) for linear in self._linears]
        expert_shapes = [(linear.in_size, tuple(linear.parts.values())) for linear in model.expert_linears]
        self._sizes = shapes + expert_shapes
        page_bytes = [
            self._page_bytes(index, part)
            for index, (_, sizes) in enumerate(self._sizes)
            for part in range(len(sizes))
            for _ in range(self._num_experts if index >= self._num_linears else 1)
        ]
        self._frame_bytes = _aligned(PAGES_IN_FRAME * max(page_bytes))
        widest = pack([size for size in page_bytes for _ in range(-(-max_rank // PAGE_RANKS))], self._frame_bytes)
        num_frames = num_slots * widest.num_frames
        if room.device_bytes is not None:
            num_frames = room.device_bytes // self._frame_bytes
        memory = torch.empty(max(num_frames, 1) * self._frame_bytes, dtype=torch.uint8, device=model.device)
        self._device_arena = Arena(memory[: num_frames * self._frame_bytes], self._frame_bytes)
        try:
            pinned = host_memory(room.host_bytes, model.device)
        except MemoryError as error:
            raise MemoryError(f"{error}: lower --adapter-host-memory") from None
        self._host_arena = Arena(pinned, self._frame_bytes)
        self._copies = make_copies(model.device) if copies is None else copies
        # What the allocator had the memory for before is done before anything is copied into it.
        self._ready = self._copies.mark()
        self._rank_pages = RankPages(memory.view(model.dtype), shapes, num_slots=num_slots, max_rank=max_rank)
        # To the kernels each expert of each slot is a slot of its own.
        self._expert_pages = RankPages(
            memory.view(model.dtype), expert_shapes, num_slots=num_slots * self._num_experts, max_rank=max_rank
        )
        self.pages: tuple[LinearPages, ...] = (
            *map(self._rank_pages.linear, range(len(shapes))),
            *map(self._expert_pages.linear, range(len(expert_shapes))),
        )
        dense_layers = () if experts is None else experts.dense_layers
        self._sparse_layers = [index for index in range(model.config.num_layers) if index not in dense_layers]
        self._residents: dict[int, _Resident] = {}

    def arrange(self, weights: AdapterWeights) -> ArrangedWeights:
        """Check an adapter and lay it out as it will lie on the device, for the host tier. Raises as `prepare`.

        For threads that no step waits for. Where the arena is full it gets ordinary memory, which copies are slower
        from.
        """
        modules, rest = self._finish(weights)
        pairs = self._placed(modules, weights)
        tensors: list[Tensor] = []

        def put_aside(tensor: Tensor) -> Tensor:
            tensors.append(dense(tensor))
            return tensors[-1].to("meta")

        rest = map_tensors(rest, put_aside)
        pages = [(module, page) for module, (a, _) in pairs.items() for page in range(-(-len(a) // PAGE_RANKS))]
        sizes = [self._page_bytes(index, part) for (index, part, _), _ in pages]
        layout = pack([*sizes, *(_aligned(tensor.nbytes) for tensor in tensors)], self._frame_bytes)
        taken = self._host_arena.take(layout)
        block, fences = (own_block(layout, self._frame_bytes), []) if taken is None else taken
        try:
            wait_for(fences)
            places: Places = {module: (len(a), []) for module, (a, _) in pairs.items()}
            for (module, page), size, place in zip(pages, sizes, layout.places, strict=False):
                a, b = pairs[module]
                ranks = slice(page * PAGE_RANKS, (page + 1) * PAGE_RANKS)
                cells = block.at(place, size).view(self._dtype).unsqueeze(0)
                write_pages(cells, a[ranks].to(self._dtype), b[:, ranks].to(self._dtype))
                places[module][1].append(place)
            rest_places = list(layout.places[len(pages) :])
            for tensor, place in zip(tensors, rest_places, strict=True):
                _view(block, place, tensor).copy_(tensor)
        except BaseException:
            self._give_host(block)
            raise
        return ArrangedWeights(
            weights.digest, weights.rank, {}, layout=layout, block=block, places=places, rest=rest,
            rest_places=rest_places,
        )  # fmt: skip

    def prepare(self, weights: AdapterWeights) -> PagedAdapter:
        """Have an adapter brought to the device beside the steps; any thread may call it, and waits for no copy.

        What `arrange` gave is only copied. Raises ValueError as the CPU's slots do, and when the device has no room.
        """
        arranged = weights if isinstance(weights, ArrangedWeights) else self.arrange(weights)
        taken = self._device_arena.take(arranged.layout)
        if taken is None:
            raise ValueError(
                f"it needs {arranged.num_bytes / 2**20:.1f} MiB on the device, some of it in one piece, and others lie "
                "between: unload some, or raise --adapter-device-memory"
            )
        block, fences = taken
        arrival = self._copies.send(pairs_of(block, arranged.block), [*fences, self._ready])
        arranged.block.last_read = arrival
        if arranged is not weights:
            self.drop(arranged)
        itemsize = self._dtype.itemsize
        tables: dict[int | None, dict[tuple[int, int], tuple[int, list[int]]]] = {None: {}}  # by expert
        for (index, part, expert), (rank, places) in arranged.places.items():
            starts = [block.start(place) // itemsize for place in places]
            if index < self._num_linears:
                tables[None][index, part] = rank, starts
            else:
                tables.setdefault(expert, {})[index - self._num_linears, part] = rank, starts
        rows, expert_rows = self._rank_pages.rows(tables[None]), None
        if len(tables) > 1:
            by_expert = [tables.get(expert, {}) for expert in range(self._num_experts)]
            expert_rows = self._expert_pages.rows(*by_expert)
        unplaced = iter(arranged.rest_places)
        rest = map_tensors(arranged.rest, lambda shape: _view(block, next(unplaced), shape))
        return PagedAdapter(
            (), rest.changes, rest.embedding, rest.head, block=block, places=arranged.places, rows=rows,
            expert_rows=expert_rows, arrival=arrival,
        )  # fmt: skip

    def install(self, slot: int, adapter: PreparedAdapter) -> None:
        """Put an adapter into a slot, in place of what was there; the device waits for its copies, not the host."""
        assert isinstance(adapter, PagedAdapter), "prepared by other slots"
        super().install(slot, adapter)
        self._copies.join(adapter.arrival)
        self._rank_pages.put_rows(slot, adapter.rows)
        if adapter.expert_rows is not None:
            self._expert_pages.put_rows(slot * self._num_experts, adapter.expert_rows)
        linears = frozenset(index for index, _, _ in adapter.places)
        self._residents[slot] = _Resident(adapter.block, linears, adapter.expert_rows is not None)

    def clear(self, slot: int) -> None:
        """Empty a slot. Steps that are under way may still read the adapter: its frames are written after them."""
        super().clear(slot)
        resident = self._residents.pop(slot, None)
        if resident is not None:
            self._rank_pages.clear(slot)
            if resident.has_experts:
                self._expert_pages.clear(slot * self._num_experts, self._num_experts)
            self._device_arena.give(resident.block, self._copies.mark())

    def drop(self, adapter: AdapterWeights | PreparedAdapter) -> None:
        """Give back the memory of what `arrange` gave, or of what `prepare` gave and no slot has had."""
        if isinstance(adapter, ArrangedWeights):
            self._give_host(adapter.block)
        elif isinstance(adapter, PagedAdapter):
            self._device_arena.give(adapter.block, adapter.arrival)

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

    @property
    def captured_pages(self) -> tuple[LinearPages | None, ...]:
        """Those of `pages` that captured steps read: not those of routers, which few adapters change."""
        return tuple(None if index in self._routers else pages for index, pages in enumerate(self.pages))

    def need_plain_steps(self, slots: Set[int]) -> bool:
        """Whether an adapter of these slots asks for what captured steps leave out: routers' products among them."""
        return super().need_plain_steps(slots) or any(
            not self._routers.isdisjoint(self._residents[slot].linears) for slot in slots
        )

    def touched(self, slots: Set[int]) -> frozenset[int]:
        """The linears that adapters of these slots touch: indices into `pages`."""
        sets = {self._residents[slot].linears for slot in slots if slot in self._residents}
        return sets.pop() if len(sets) == 1 else frozenset[int]().union(*sets)

    def pages_of(self, slots: Set[int]) -> tuple[LinearPages | None, ...]:
        """Each linear's pages, by its index, then those of experts; None where no adapter of these slots touches it."""
        touched = self.touched(slots)
        return tuple(pages if index in touched else None for index, pages in enumerate(self.pages))

    @property
    def _takes_experts(self) -> bool:
        return self._num_experts > 0

    def _placed(
        self, pairs: dict[str, tuple[Tensor, Tensor]], weights: AdapterWeights
    ) -> dict[Module, tuple[Tensor, Tensor]]:
        """A and B of all modules, those of experts among them."""
        placed = {(*self._places[module], 0): pair for module, pair in pairs.items()}
        for (layer, linear, part, expert), pair in weights.experts.items():
            index = self._num_linears + 2 * self._sparse_layers.index(layer) + linear
            placed[index, part, expert] = pair
        return placed

    def _page_bytes(self, index: int, part: int) -> int:
        in_size, part_sizes = self._sizes[index]
        return PAGE_RANKS * (in_size + part_sizes[part]) * self._dtype.itemsize

    def _give_host(self, block: Block) -> None:
        if self._host_arena.owns(block):
            self._host_arena.give(block, block.last_read)


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


def _view(block: Block, place: Place, like: Tensor) -> Tensor:
    """The memory of a piece as a tensor of the same type, shape and strides."""
    return block.at(place, like.nbytes).view(like.dtype).as_strided(like.shape, like.stride())


def make_slots(model: "CausalLM", num_slots: int, max_rank: int, room: AdapterRoom = DEFAULT_ROOM) -> AdapterSlots:
    """The slots of the device that the model is on."""
    if has_gpu_forms(model.device):
        return PagedAdapterSlots(model, num_slots, max_rank, room)
    return AdapterSlots(model, num_slots)
