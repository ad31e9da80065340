"""Shrink and expand over rank pages against the row-by-row reference, over the ways that adapters mix."""

import random
from dataclasses import replace

import pytest
import torch
from rank_pages import scattered_pages
from torch import Tensor
from triton_cases import DEVICE, DTYPES, assert_near, error

from loraplex_kernels.gpu import lora as gpu
from loraplex_kernels.lora_pages import (
    DECODE_TILE_ROWS,
    PREFILL_TILE_ROWS,
    LinearPages,
    RowDelta,
    RowTiles,
    make_tiles,
    write_pages,
)
from loraplex_kernels.reference import lora_pages as reference

IN_SIZE = 72
PARTS = (40, 8, 24)
# By slot, the rank of each part; 0: the adapter does not touch it.
MIXED = {0: (8, 8, 8), 1: (3, 0, 5), 2: (16, 1, 0), 3: (0, 0, 1), 4: (33, 17, 9), 6: (0, 64, 0)}


def pages_of(
    ranks: dict[int, tuple[int, ...]], dtype: torch.dtype = torch.float32, parts: tuple[int, ...] = PARTS,
    in_size: int = IN_SIZE,
) -> LinearPages:  # fmt: skip
    """The pages of the second of two linears."""
    return scattered_pages([(8, (4,)), (in_size, parts)], {1: ranks}, dtype).linear(1)


def deltas(x: Tensor, pages: LinearPages, tiles: RowTiles, num_splits: int | None = None) -> tuple[Tensor, Tensor]:
    """What the kernels and the reference write over the same cells."""
    ours, truth = (torch.full((len(x), sum(pages.part_sizes)), 7.0, dtype=x.dtype, device=DEVICE) for _ in range(2))
    gpu.expand_rows(gpu.shrink_rows(x, pages, tiles, num_splits), pages, tiles, ours)
    reference.expand_rows(reference.shrink_rows(x, pages, tiles), pages, tiles, truth)
    return ours, truth


def tiles_of(mix: list[tuple[int, int]], tile_rows: int = DECODE_TILE_ROWS) -> RowTiles:
    """Slot and number of rows of each run."""
    starts = [0]
    for _, count in mix:
        starts.append(starts[-1] + count)
    return make_tiles(starts, [slot for slot, _ in mix], tile_rows, DEVICE)


MIXES = {
    "one row": [(2, 1)],
    "identical": [(0, 12)],
    "more than a tile": [(4, 19)],
    "distinct": [(0, 1), (1, 1), (2, 1), (3, 1), (4, 1), (6, 1)],
    "base rows between": [(-1, 2), (0, 2), (-1, 1), (4, 3), (-1, 3)],
    "an empty slot": [(5, 2), (0, 1)],
    "base only": [(-1, 3)],
}


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mix", MIXES)
def test_each_row_gets_the_delta_of_its_own_adapter(dtype: torch.dtype, mix: str) -> None:
    pages, tiles = pages_of(MIXED, dtype), tiles_of(MIXES[mix])
    x = torch.randn(len(tiles.row_slots), IN_SIZE, dtype=dtype, device=DEVICE)
    assert_near(*deltas(x, pages, tiles))


@pytest.mark.parametrize("rank", [1, 2, 7, 8, 9, 15, 16, 17, 31, 64, 100, 512])
def test_every_rank_is_taken_exactly(rank: int) -> None:
    pages = pages_of({1: (rank, 0, rank), 2: (1, 2, 3)})
    x, tiles = torch.randn(4, IN_SIZE, device=DEVICE), tiles_of([(1, 3), (2, 1)])
    assert_near(*deltas(x, pages, tiles))


@pytest.mark.parametrize("num_adapters", [1, 2, 13, 64])
def test_any_number_of_adapters_share_a_batch(num_adapters: int) -> None:
    ranks = {slot: (1 + slot % 9, 4 * (slot % 3), 8) for slot in range(num_adapters)}
    pages = pages_of(ranks)
    slots = random.Random(1).choices([*ranks, -1], k=num_adapters + 1)
    tiles = tiles_of([(slot, 1) for slot in sorted(slots)])
    assert_near(*deltas(torch.randn(len(slots), IN_SIZE, device=DEVICE), pages, tiles))


@pytest.mark.parametrize("tile_rows", [64, 128])
@pytest.mark.parametrize("dtype", DTYPES)
def test_long_runs_take_higher_tiles(dtype: torch.dtype, tile_rows: int) -> None:
    pages, tiles = pages_of(MIXED, dtype), tiles_of([(0, 67), (-1, 5), (4, 131), (1, 1)], tile_rows)
    assert tiles.counts.tolist() == ([64, 3, 64, 64, 3, 1] if tile_rows == 64 else [67, 128, 3, 1])
    assert_near(*deltas(torch.randn(204, IN_SIZE, dtype=dtype, device=DEVICE), pages, tiles))


@pytest.mark.parametrize("num_splits", [1, 2, 3])
def test_however_the_inputs_are_split(num_splits: int) -> None:
    pages = pages_of({1: (20,)}, parts=(16,), in_size=300)
    wide = torch.randn(5, 310, device=DEVICE)
    ours, truth = deltas(wide[:, :300], pages, tiles_of([(1, 5)]), num_splits)
    assert_near(ours, truth)


def test_one_linear_and_two_parts_of_odd_sizes_are_served() -> None:
    for parts in ((257,), (7, 300)):
        ranks = {0: (5,) * len(parts), 1: (0,) * (len(parts) - 1) + (9,)}
        pages = pages_of(ranks, parts=parts)
        tiles = tiles_of([(0, 2), (1, 1)])
        assert_near(*deltas(torch.randn(3, IN_SIZE, device=DEVICE), pages, tiles))


@pytest.mark.parametrize("programs", [1, 3, 40])
def test_however_many_programs_share_the_tiles_the_result_is_the_same(
    programs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Programs then take several tiles each, and some none; where they are many, they share the ranks of a tile."""
    pages, tiles = pages_of(MIXED), tiles_of([(0, 2), (-1, 1), (4, 3), (6, 1), (5, 1), (2, 17)])
    x = torch.randn(25, IN_SIZE, device=DEVICE)
    before, _ = deltas(x, pages, tiles)
    monkeypatch.setattr(gpu, "PROGRAMS", programs)
    ours, truth = deltas(x, pages, tiles)
    assert_near(ours, truth)
    assert torch.equal(ours, before)


def test_what_shrink_has_not_written_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def filled(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.full(shape, float("nan"), dtype=dtype, device=device)

    pages, x = pages_of(MIXED), torch.randn(20, IN_SIZE, device=DEVICE)
    for tile_rows in (DECODE_TILE_ROWS, PREFILL_TILE_ROWS):
        tiles = tiles_of([(-1, 1), (1, 2), (4, 16), (0, 1)], tile_rows)
        with monkeypatch.context() as patch:
            patch.setattr(torch, "empty", filled)
            h = gpu.shrink_rows(x, pages, tiles)
        ours = torch.zeros(20, sum(PARTS), device=DEVICE)
        gpu.expand_rows(h, pages, tiles, ours)
        assert not ours.isnan().any()


def test_the_device_side_count_bounds_the_work() -> None:
    """As in a captured graph: the arrays are as long as the largest batch, and hold old tiles beyond the count."""
    pages = pages_of(MIXED)
    stale = tiles_of([(0, 2), (1, 1), (4, 3), (2, 2)])
    x = torch.randn(8, IN_SIZE, device=DEVICE)
    for count in range(5):
        tiles = replace(stale, num_tiles=torch.tensor([count], dtype=torch.int32, device=DEVICE))
        ours, _ = deltas(x, pages, tiles)
        whole, _ = deltas(x, pages, stale)
        computed = sum(stale.counts.tolist()[:count])
        assert torch.equal(ours[:computed], whole[:computed])
        assert (ours[computed:] == 7).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_delta_is_added_where_the_adapter_touches_the_part_and_nowhere_else(dtype: torch.dtype) -> None:
    pages, tiles = pages_of(MIXED, dtype), tiles_of([(-1, 1), (1, 2), (5, 1), (4, 1)])
    given, delta = (torch.randn(5, sum(PARTS), dtype=dtype, device=DEVICE) for _ in range(2))
    delta[:, 40:48] = float("nan")
    delta[4, 40:48] = 1
    ours, truth = given.clone(), given.clone()
    gpu.add_rows(ours, RowDelta(delta, pages, tiles))
    reference.add_rows(truth, RowDelta(delta, pages, tiles))
    assert torch.equal(ours[[0, 3]], given[[0, 3]])
    assert_near(ours, truth)


def test_the_reference_is_the_formula() -> None:
    tables = scattered_pages([(4, (3, 2))], {}, torch.float32, num_free=2)
    a, b = torch.randn(9, 4, device=DEVICE), torch.randn(2, 9, device=DEVICE)
    write_pages(tables.linear(0).cells[: 2 * 8 * 6].view(2, -1), a, b)
    tables.put(0, {(0, 1): (9, [0, 8 * 6])})
    pages, tiles, x = tables.linear(0), tiles_of([(0, 5)]), torch.randn(5, 4, device=DEVICE)
    out = torch.zeros(5, 5, device=DEVICE)
    delta = torch.full_like(out, float("nan"))
    reference.expand_rows(reference.shrink_rows(x, pages, tiles), pages, tiles, delta)
    reference.add_rows(out, RowDelta(delta, pages, tiles))
    assert torch.allclose(out, torch.cat((torch.zeros(5, 3, device=DEVICE), x @ a.T @ b.T), 1), atol=1e-5)
    tables.clear(0)
    assert not reference.shrink_rows(x, pages, tiles).any()


# What a fault does: each plants one and shows that the comparison above would notice.


def planted(pages: LinearPages, tiles: RowTiles, faulty: LinearPages, faulty_tiles: RowTiles) -> float:
    x = torch.randn(len(tiles.row_slots), IN_SIZE, device=DEVICE)
    ours = torch.zeros(len(x), sum(PARTS), device=DEVICE)
    gpu.expand_rows(gpu.shrink_rows(x, faulty, faulty_tiles), faulty, faulty_tiles, ours)
    truth = torch.zeros_like(ours)
    reference.expand_rows(reference.shrink_rows(x, pages, tiles), pages, tiles, truth)
    return error(ours.nan_to_num(1e9), truth)


def test_a_stale_tile_table_is_noticed() -> None:
    pages, tiles = pages_of(MIXED), tiles_of([(0, 2), (1, 2)])
    assert planted(pages, tiles, pages, tiles) < 2e-5
    assert planted(pages, tiles, pages, tiles_of([(1, 2), (0, 2)])) > 0.1
    assert planted(pages, tiles, pages, replace(tiles, num_tiles=tiles.num_tiles - 1)) > 0.1
    assert planted(pages, tiles, pages, replace(tiles, counts=tiles.counts - 1)) > 0.1


def test_a_wrong_page_is_noticed() -> None:
    pages, tiles = pages_of(MIXED), tiles_of([(4, 2)])
    for index in range(5):
        table = pages.page_table.clone()
        table[4, 0, index] = pages.page_table[2, 0, 0]
        assert planted(pages, tiles, replace(pages, page_table=table), tiles) > 0.02, index


def test_a_rank_beyond_the_adapters_own_is_noticed() -> None:
    pages, tiles = pages_of(MIXED), tiles_of([(1, 2)])
    assert planted(pages, tiles, replace(pages, ranks=pages.ranks + 1), tiles) > 0.1
    assert planted(pages, tiles, replace(pages, ranks=(pages.ranks - 1).clamp(min=0)), tiles) > 0.02
