"""Mixtures of experts on a GPU: rows are routed, ordered and cut into tiles of one expert without asking the device."""

from dataclasses import dataclass

from torch import Tensor

from loraplex_kernels.dispatch import on_gpu
from loraplex_kernels.grouped_linear import PackedGroups
from loraplex_kernels.lora_pages import RowDelta, RowTiles
from loraplex_kernels.reference import moe_tiles as _reference

# Rows of a tile: the least that tensor cores multiply, and more where experts have many rows.
FEW_ROWS, MANY_ROWS = 16, 64


@dataclass(frozen=True, slots=True)
class ExpertTiles:
    """T tokens' choices of k experts each, as R = T * k rows that are ordered by expert, and by token for each expert.

    A tile is up to `tile_rows` neighbouring rows of one expert. Kernels run as many tiles as `num_tiles`, read on the
    device, says; tiles beyond it hold no meaning. So a captured graph serves whatever experts its tokens choose.
    """

    weights: Tensor  # [T, k] float32: the share of each choice
    rows: Tensor  # [T, k] int32: the row of each choice
    tokens: Tensor  # [R] int32: the token of each row
    row_slots: Tensor | None  # [R] int32: adapter slot * experts + expert, -1 for no adapter; None: no row has one
    starts: Tensor  # [most tiles] int32: first row
    counts: Tensor  # [most tiles] int32: rows, 1 to tile_rows
    experts: Tensor  # [most tiles] int32
    num_tiles: Tensor  # [1] int32
    tile_rows: int


def rows_of_a_tile(num_rows: int, num_experts: int) -> int:
    """How high tiles should be for that many rows, if experts are chosen about equally often."""
    return FEW_ROWS if num_rows <= FEW_ROWS * num_experts else MANY_ROWS


def most_tiles(num_rows: int, num_experts: int, tile_rows: int) -> int:
    """The most tiles that rows may need: each expert with rows has one that is not full, at most."""
    return min(num_rows, num_experts) + num_rows // tile_rows


def route_rows(
    scores: Tensor, num_chosen: int, rescales: bool, token_slots: Tensor | None = None, tile_rows: int | None = None
) -> ExpertTiles:
    """Send each token to the experts with its `num_chosen` highest scores, of equal ones to the first.

    scores: [T, experts], columns dense, of any float type; token_slots: [T] int32, the adapter slot of each token, -1
    for none. A choice's weight is the softmax of its score over all experts, in float32; with `rescales` a token's
    weights are divided by their sum. A token whose scores are no numbers goes to some experts, with weights that are
    none either.
    """
    num_rows, num_experts = len(scores) * num_chosen, scores.shape[1]
    tile_rows = tile_rows or rows_of_a_tile(num_rows, num_experts)
    if on_gpu(scores):
        from loraplex_kernels.gpu import moe as _gpu  # Triton exists on GPU machines only

        found = _gpu.route_rows(scores, num_chosen, rescales, token_slots, tile_rows)
    else:
        found = _reference.route_rows(scores, num_chosen, rescales, token_slots, tile_rows)
    return ExpertTiles(*found, tile_rows)


def expert_linear(x: Tensor, weight: Tensor, tiles: ExpertTiles, *, is_by_token: bool) -> Tensor:
    """Return each row's product with the weight of its expert, [R, out].

    x: with `is_by_token` [T, in], else [R, in], columns dense; weight: [experts, out, in], dense, in the dtype of `x`.
    Sums are float32.
    """
    if on_gpu(x):
        from loraplex_kernels.gpu import moe as _gpu  # Triton exists on GPU machines only

        return _gpu.expert_linear(x, weight, tiles, is_by_token)
    return _reference.expert_linear(x, weight, tiles, is_by_token)


def grouped_expert_linear(x: Tensor, weight: PackedGroups, tiles: ExpertTiles, *, is_by_token: bool) -> Tensor:
    """As `expert_linear`, over small whole numbers in groups that `stack_groups` has put together."""
    if on_gpu(x):
        from loraplex_kernels.gpu import grouped_linear as _gpu  # Triton exists on GPU machines only

        return _gpu.grouped_expert_linear(x, weight, tiles, is_by_token)
    return _reference.grouped_expert_linear(x, weight, tiles, is_by_token)


def sum_rows(rows: Tensor, tiles: ExpertTiles, delta: RowDelta | None = None) -> Tensor:
    """Return each token's sum of its rows, by weight; [T, size].

    rows: [R, size], dense; `delta`, of one part, is added to them first. The sum is taken in float32.
    """
    if on_gpu(rows):
        from loraplex_kernels.gpu import moe as _gpu  # Triton exists on GPU machines only

        return _gpu.sum_rows(rows, tiles, delta)
    return _reference.sum_rows(rows, tiles, delta)


def adapter_tiles(tiles: ExpertTiles, most_runs: int) -> RowTiles:
    """Cut the rows that have adapters into tiles of one expert and adapter, whose slot is that of `row_slots`.

    A tile also ends at each multiple of its height. `most_runs`: how many runs of one adapter's rows there are at most.
    """
    row_slots = tiles.row_slots
    assert row_slots is not None, "rows were routed without their adapters"
    if on_gpu(row_slots):
        from loraplex_kernels.gpu import moe as _gpu  # Triton exists on GPU machines only

        most = min(len(row_slots), most_runs + len(row_slots) // tiles.tile_rows)
        cut = _gpu.cut_rows(row_slots, tiles.tile_rows, most)
    else:
        cut = _reference.cut_rows(row_slots, tiles.tile_rows)
    return RowTiles(*cut, row_slots, tiles.tile_rows)
