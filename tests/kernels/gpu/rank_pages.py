"""Random adapters in rank pages that lie in random places, with what is not a number wherever nothing valid lies."""

import random
from collections.abc import Mapping, Sequence

import torch
from triton_cases import DEVICE

from loraplex_kernels.lora_pages import PAGE_RANKS, RankPages, RowDelta, make_tiles, write_pages

# Of 5 rows: base, an adapter of every part, none, one of some parts, an empty slot.
SEGMENTS = ([0, 1, 2, 3, 4, 5], [-1, 0, -1, 1, 2])
# By linear and slot, the rank of each part.
RanksOfLinears = Mapping[int, Mapping[int, tuple[int, ...]]]


def scattered_pages(
    linears: Sequence[tuple[int, Sequence[int]]],
    ranks: RanksOfLinears,
    dtype: torch.dtype,
    *,
    num_free: int = 0,
    num_slots: int = 65,
) -> RankPages:
    """Tables and pages of these adapters; some slots and pages of the largest size stay free."""
    sizes = [[PAGE_RANKS * (in_size + size) for size in parts] for in_size, parts in linears]
    needs = [
        (linear, slot, part, rank)
        for linear, slots in ranks.items()
        for slot, by_part in slots.items()
        for part, rank in enumerate(by_part)
        if rank
    ]
    order = [(need, page) for need in needs for page in range(-(-need[3] // PAGE_RANKS))]
    random.Random(3).shuffle(order)
    starts: dict[tuple[tuple[int, int, int, int], int], int] = {}
    end = 0
    for need, page in order:
        starts[need, page] = end
        end += sizes[need[0]][need[2]]
    cells = torch.full((end + num_free * max(map(max, sizes)),), float("nan"), dtype=dtype)
    highest = max((need[3] for need in needs), default=PAGE_RANKS * max(num_free, 1))
    tables = RankPages(cells.to(DEVICE), linears, num_slots=num_slots, max_rank=highest)
    by_slot: dict[int, dict[tuple[int, int], tuple[int, list[int]]]] = {}
    for need in needs:
        linear, slot, part, rank = need
        in_size, out_size = linears[linear][0], linears[linear][1][part]
        pages = torch.full((-(-rank // PAGE_RANKS), sizes[linear][part]), float("nan"), dtype=dtype)
        write_pages(pages, torch.randn(rank, in_size).to(dtype) / 8, torch.randn(out_size, rank).to(dtype) / rank)
        places = [starts[need, page] for page in range(len(pages))]
        for place, numbers in zip(places, pages, strict=True):
            tables.linear(linear).cells[place : place + len(numbers)] = numbers.to(DEVICE)
        by_slot.setdefault(slot, {})[linear, part] = (rank, places)
    for slot, modules in by_slot.items():
        tables.put(slot, modules)
    return tables


def delta_of(part_sizes: tuple[int, ...], dtype: torch.dtype) -> RowDelta:
    """A delta with what is not a number wherever the row's adapter does not touch the part."""
    ranks = {0: (4,) * len(part_sizes), 1: tuple(3 * (part == 0) for part in range(len(part_sizes)))}
    pages = scattered_pages([(8, part_sizes)], {0: ranks}, dtype).linear(0)
    values = torch.full((5, sum(part_sizes)), float("nan"), dtype=dtype, device=DEVICE)
    values[1] = torch.randn(sum(part_sizes))
    values[3, : part_sizes[0]] = torch.randn(part_sizes[0])
    return RowDelta(values, pages, make_tiles(*SEGMENTS, 16, DEVICE))
