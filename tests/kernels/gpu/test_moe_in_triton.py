"""Mixtures of experts in Triton against the reference: routing and cutting exactly, products and sums nearly."""

from dataclasses import replace

import pytest
import torch
from rank_pages import scattered_pages
from test_grouped_linear_in_triton import quantized
from torch import Tensor
from triton_cases import DEVICE, DTYPES, assert_near, error

from loraplex_kernels import dispatch, lora_pages, moe_tiles
from loraplex_kernels.activation import silu_and_mul
from loraplex_kernels.gpu import grouped_linear as gpu_grouped
from loraplex_kernels.gpu import lora as gpu_lora
from loraplex_kernels.gpu import moe as gpu
from loraplex_kernels.grouped_linear import PackedGroups, pack_groups, stack_groups
from loraplex_kernels.lora_pages import LinearPages, RowDelta, RowTiles
from loraplex_kernels.moe_tiles import ExpertTiles
from loraplex_kernels.reference import moe_tiles as reference

# Tokens, experts, chosen ones.
SHAPES = [(1, 1, 1), (1, 8, 2), (3, 64, 8), (33, 6, 3), (7, 5, 5), (70, 2, 1)]


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)


def scores_of(num_tokens: int, num_experts: int) -> Tensor:
    """Scores that are all different, so that any order of choices has one truth."""
    return (torch.randn(num_tokens, num_experts).argsort(-1) / 4).to(DEVICE)


def crowded(num_tokens: int, num_experts: int, favourites: tuple[int, ...]) -> Tensor:
    """Scores by which all tokens go to the same experts: the others have no rows."""
    scores = scores_of(num_tokens, num_experts)
    scores[:, list(favourites)] += 100
    return scores


def tiles_of(scores: Tensor, num_chosen: int, tile_rows: int = 16, slots: Tensor | None = None) -> ExpertTiles:
    return ExpertTiles(*reference.route_rows(scores, num_chosen, True, slots, tile_rows), tile_rows)


def assert_same_route(scores: Tensor, num_chosen: int, rescales: bool, slots: Tensor | None, tile_rows: int) -> None:
    ours = gpu.route_rows(scores, num_chosen, rescales, slots, tile_rows)
    truth = reference.route_rows(scores, num_chosen, rescales, slots, tile_rows)
    assert_near(ours[0], truth[0])
    count = int(truth[7])
    assert int(ours[7]) == count <= len(ours[4])
    for mine, true in zip(ours[1:3], truth[1:3], strict=True):
        assert torch.equal(mine, true)
    assert (ours[3] is None and truth[3] is None) or torch.equal(ours[3], truth[3])
    for mine, true in zip(ours[4:7], truth[4:7], strict=True):
        assert torch.equal(mine[:count], true)


@pytest.mark.parametrize(("num_tokens", "num_experts", "num_chosen"), SHAPES)
@pytest.mark.parametrize("tile_rows", [16, 64])
def test_rows_are_routed_and_cut_as_by_plain_torch(
    num_tokens: int, num_experts: int, num_chosen: int, tile_rows: int
) -> None:
    scores = scores_of(num_tokens, num_experts)
    slots = torch.randint(-1, 3, (num_tokens,), dtype=torch.int32, device=DEVICE)
    assert_same_route(scores, num_chosen, True, slots, tile_rows)
    assert_same_route(scores.half(), num_chosen, False, None, tile_rows)


@pytest.mark.parametrize(("num_tokens", "favourites"), [(40, (2,)), (1, (4,)), (17, (0, 4)), (64, (1, 3))])
def test_experts_without_rows_have_no_tile(num_tokens: int, favourites: tuple[int, ...]) -> None:
    scores = crowded(num_tokens, 5, favourites)
    assert_same_route(scores, len(favourites), True, None, 16)
    assert set(tiles_of(scores, len(favourites)).experts.tolist()) == set(favourites)


def test_more_choices_than_a_program_reads_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "SCAN_BLOCKS", (16, 16))
    slots = torch.arange(50, dtype=torch.int32, device=DEVICE) // 9 - 1
    assert_same_route(crowded(50, 4, (2,)), 2, True, slots, 16)
    row_slots = tiles_of(scores_of(50, 4), 2, 16, slots).row_slots
    assert row_slots is not None
    assert_same_cut(row_slots, 16)


def test_equal_scores_go_to_the_first_experts_and_no_number_to_some() -> None:
    scores = torch.zeros(3, 6, device=DEVICE)
    scores[1] = float("nan")
    scores[2, 4] = float("nan")
    ours = ExpertTiles(*gpu.route_rows(scores, 2, True, None, 16), 16)
    assert ours.tokens.tolist() == [0, 2, 0, 2, 1, 1] and ours.rows[0].tolist() == [0, 2]
    assert ours.weights.isnan().any(1).tolist() == [False, True, True]
    assert set(ours.experts[: int(ours.num_tiles)].tolist()) == {0, 1, 5}


def assert_same_cut(row_slots: Tensor, tile_rows: int) -> None:
    truth = reference.cut_rows(row_slots, tile_rows)
    count = int(truth[3])
    ours = gpu.cut_rows(row_slots, tile_rows, max(count, 1))
    assert int(ours[3]) == count
    for mine, true in zip(ours[:3], truth[:3], strict=True):
        assert torch.equal(mine[:count], true)


@pytest.mark.parametrize(
    "runs",
    [
        [(4, 1)],
        [(-1, 5)],
        [(3, 40)],
        [(3, 16), (5, 16), (-1, 1), (5, 2)],
        [(1, 1), (2, 1), (-1, 1), (2, 3), (7, 30), (8, 1)],
    ],
)
def test_rows_are_cut_by_their_adapters(runs: list[tuple[int, int]]) -> None:
    row_slots = torch.tensor([slot for slot, count in runs for _ in range(count)], dtype=torch.int32, device=DEVICE)
    assert_same_cut(row_slots, 16)
    assert_same_cut(row_slots, 64)


CASES = {
    "spread": lambda: (scores_of(21, 6), 2),
    "one expert": lambda: (crowded(37, 6, (3,)), 1),
    "empty experts": lambda: (crowded(9, 64, (0, 63)), 2),
    "one token": lambda: (scores_of(1, 8), 3),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("tile_rows", [16, 64])
def test_each_row_goes_through_its_experts_weight(dtype: torch.dtype, case: str, tile_rows: int) -> None:
    scores, num_chosen = CASES[case]()
    tiles = tiles_of(scores, num_chosen, tile_rows)
    weight = torch.randn(scores.shape[1], 70, 136).to(DEVICE, dtype) / 12
    for is_by_token in (True, False):
        num_rows = len(scores) if is_by_token else len(tiles.tokens)
        x = torch.randn(num_rows, 140).to(DEVICE, dtype)[:, :136]
        assert_near(
            gpu.expert_linear(x, weight, tiles, is_by_token), reference.expert_linear(x, weight, tiles, is_by_token)
        )


def packed_experts(num_experts: int, dtype: torch.dtype, *, act_order: bool, bits: int = 4) -> PackedGroups:
    weights = [quantized(bits, 40, 128, 32, act_order=act_order) for _ in range(num_experts)]
    stacked = stack_groups(
        [pack_groups(w.numbers, w.zeros, w.scales, w.group_of, w.bits, dtype, DEVICE) for w in weights]
    )
    assert stacked is not None
    return stacked


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize(("bits", "num_splits", "tile_rows"), [(4, 1, 16), (4, 2, 64), (8, None, 16)])
def test_quantised_experts_are_made_weights_while_they_are_multiplied(
    act_order: bool, bits: int, num_splits: int | None, tile_rows: int
) -> None:
    tiles = tiles_of(crowded(11, 4, (1, 2)), 2, tile_rows)
    weight = packed_experts(4, torch.float32, act_order=act_order, bits=bits)
    for is_by_token in (True, False):
        x = torch.randn(11 if is_by_token else 22, 128, device=DEVICE)
        ours = gpu_grouped.grouped_expert_linear(x, weight, tiles, is_by_token, num_splits)
        assert_near(ours, reference.grouped_expert_linear(x, weight, tiles, is_by_token))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_token_is_the_sum_of_its_experts_by_weight(dtype: torch.dtype) -> None:
    tiles = tiles_of(scores_of(13, 7), 3)
    rows = torch.randn(39, 600).to(DEVICE, dtype)
    assert_near(gpu.sum_rows(rows, tiles, None), reference.sum_rows(rows, tiles, None))


def gpu_delta(x: Tensor, pages: LinearPages, rows: RowTiles) -> Tensor:
    delta = torch.zeros(len(x), sum(pages.part_sizes), device=DEVICE)
    gpu_lora.expand_rows(gpu_lora.shrink_rows(x, pages, rows), pages, rows, delta)
    return delta


def test_adapters_on_experts_get_their_own_deltas_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slots 0 and 2 of three have pairs, some experts of these only, at their own ranks; slot 1 has none."""
    num_experts, sizes = 4, (24, (20, 20))
    ranks = {0: (5, 5), 1: (0, 9), 3: (3, 3), 8: (17, 1), 10: (8, 0)}
    pages = scattered_pages([sizes], {0: ranks}, torch.float32, num_slots=12).linear(0)
    token_slots = torch.tensor([0] * 9 + [-1] * 3 + [1] * 2 + [2] * 7, dtype=torch.int32, device=DEVICE)
    x = torch.randn(21, sizes[0], device=DEVICE)
    found = []
    for interprets in (True, False):
        monkeypatch.setattr(dispatch, "INTERPRETS", interprets)
        torch.manual_seed(1)
        tiles = moe_tiles.route_rows(scores_of(21, num_experts), 2, True, token_slots, 16)
        rows = moe_tiles.adapter_tiles(tiles, most_runs=12)
        given = x[tiles.tokens.long()]
        delta = torch.full((42, 40), 7.0, device=DEVICE)
        lora_pages.expand_rows(lora_pages.shrink_rows(given, pages, rows), pages, rows, delta)
        up = silu_and_mul(torch.ones(42, 40, device=DEVICE), RowDelta(delta, pages, rows))
        found.append((delta, up))
    (ours, our_up), (truth, true_up) = found
    assert_near(ours, truth)
    assert_near(our_up, true_up)
    assert 0 < (truth != 7).sum() < truth.numel()
    tiles = tiles_of(scores_of(21, num_experts), 2, 16, token_slots)
    rows = moe_tiles.adapter_tiles(tiles, most_runs=12)
    given = x[tiles.tokens.long()]
    truth = gpu_delta(given, pages, rows)
    slots = rows.slots.clone()
    slots[: int(rows.num_tiles)] = rows.slots[: int(rows.num_tiles)].roll(1)
    for faulty in (replace(rows, slots=slots), replace(rows, num_tiles=rows.num_tiles // 2)):
        assert error(gpu_delta(given, pages, faulty), truth) > 0.05


def test_no_rows_give_none() -> None:
    tiles = moe_tiles.route_rows(torch.zeros(0, 4, device=DEVICE), 2, True)
    x, weight = torch.zeros(0, 8, device=DEVICE), torch.zeros(4, 6, 8, device=DEVICE)
    found = moe_tiles.expert_linear(x, weight, tiles, is_by_token=True)
    assert found.shape == (0, 6) and moe_tiles.sum_rows(found, tiles).shape == (0, 6)


def test_the_device_side_count_bounds_the_work_of_experts() -> None:
    tiles = tiles_of(scores_of(20, 4), 2)
    x, weight = torch.randn(20, 16, device=DEVICE), torch.randn(4, 8, 16, device=DEVICE)
    whole = gpu.expert_linear(x, weight, tiles, True)
    longer = [torch.cat((part, part)) for part in (tiles.starts, tiles.counts, tiles.experts)]
    stale = replace(tiles, starts=longer[0], counts=longer[1], experts=longer[2].roll(1))
    one = replace(stale, experts=longer[2], num_tiles=torch.ones_like(tiles.num_tiles))
    computed = int(tiles.counts[0])
    assert torch.equal(gpu.expert_linear(x, weight, one, True)[:computed], whole[:computed])


def test_a_stale_tile_table_or_a_wrong_expert_or_token_is_noticed() -> None:
    tiles, old = (tiles_of(crowded(20, 4, favourites), 2) for favourites in ((0, 2), (1, 3)))
    x, weight = torch.randn(20, 16, device=DEVICE), torch.randn(4, 8, 16, device=DEVICE)
    packed = packed_experts(4, torch.float32, act_order=True)
    wide = torch.randn(20, 128, device=DEVICE)
    truth = reference.expert_linear(x, weight, tiles, True)
    packed_truth = reference.grouped_expert_linear(wide, packed, tiles, True)
    assert error(gpu.expert_linear(x, weight, tiles, True), truth) < 2e-5
    for faulty in (
        replace(old, tokens=tiles.tokens),
        replace(tiles, experts=tiles.experts.roll(1)),
        replace(tiles, tokens=tiles.tokens.roll(1)),
    ):
        assert error(gpu.expert_linear(x, weight, faulty, True), truth) > 0.1
        assert error(gpu_grouped.grouped_expert_linear(wide, packed, faulty, True), packed_truth) > 0.05
    rows = torch.randn(40, 8, device=DEVICE)
    truth = reference.sum_rows(rows, tiles, None)
    assert error(gpu.sum_rows(rows, replace(tiles, rows=tiles.rows.roll(1)), None), truth) > 0.1
    assert error(gpu.sum_rows(rows, replace(tiles, weights=tiles.weights.flip(1)), None), truth) > 0.02
