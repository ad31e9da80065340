"""Mixtures of experts in tiles in plain torch, one row at a time."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from loraplex_kernels.reference.grouped_linear import dequantize
from loraplex_kernels.reference.lora_pages import with_delta

if TYPE_CHECKING:
    from loraplex_kernels.grouped_linear import PackedGroups
    from loraplex_kernels.lora_pages import RowDelta
    from loraplex_kernels.moe_tiles import ExpertTiles

Cut = tuple[Tensor, Tensor, Tensor, Tensor]  # starts, counts, owners, their number


def route_rows(
    scores: Tensor, num_chosen: int, rescales: bool, token_slots: Tensor | None, tile_rows: int
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor, Tensor, Tensor, Tensor]:
    num_tokens, num_experts = scores.shape
    shares = scores.float().softmax(-1)
    experts = shares.sort(dim=-1, descending=True, stable=True).indices[:, :num_chosen]
    weights = shares.gather(1, experts)
    if rescales:
        weights = weights / weights.sum(-1, keepdim=True)
    chosen = experts.flatten()
    order = chosen.argsort(stable=True)
    rows = torch.empty_like(order)
    rows[order] = torch.arange(len(order), device=order.device)
    tokens = order // num_chosen
    row_slots = None
    if token_slots is not None:
        slots = token_slots[tokens]
        row_slots = torch.where(slots < 0, -1, slots * num_experts + chosen[order]).int()
    starts: list[int] = []
    counts: list[int] = []
    owners: list[int] = []
    first = 0
    for expert, count in enumerate(chosen.bincount(minlength=num_experts).tolist()):
        for place in range(0, count, tile_rows):
            starts.append(first + place)
            counts.append(min(tile_rows, count - place))
            owners.append(expert)
        first += count
    cut = _cut(starts, counts, owners, scores.device)
    return weights, rows.view(num_tokens, num_chosen).int(), tokens.int(), row_slots, *cut


def expert_linear(x: Tensor, weight: Tensor, tiles: "ExpertTiles", is_by_token: bool) -> Tensor:
    out = x.new_zeros(len(tiles.tokens), weight.shape[1])
    num_tiles = int(tiles.num_tiles)
    listed = (tiles.starts.tolist(), tiles.counts.tolist(), tiles.experts.tolist())
    for start, count, expert in list(zip(*listed, strict=True))[:num_tiles]:
        for row in range(start, start + count):
            numbers = x[tiles.tokens[row] if is_by_token else row]
            out[row] = (weight[expert].float() @ numbers.float()).to(x.dtype)
    return out


def grouped_expert_linear(x: Tensor, weight: "PackedGroups", tiles: "ExpertTiles", is_by_token: bool) -> Tensor:
    weights = [dequantize(weight.of_expert(expert)).t() for expert in range(len(weight.words))]
    return expert_linear(x, torch.stack(weights).to(x.dtype), tiles, is_by_token)


def sum_rows(rows: Tensor, tiles: "ExpertTiles", delta: "RowDelta | None") -> Tensor:
    whole = with_delta(rows, delta).float()
    return (whole[tiles.rows.long()] * tiles.weights.unsqueeze(-1)).sum(1).to(rows.dtype)


def cut_rows(row_slots: Tensor, tile_rows: int) -> Cut:
    starts: list[int] = []
    counts: list[int] = []
    owners: list[int] = []
    before = -1
    for row, slot in enumerate(row_slots.tolist()):
        if slot >= 0:
            if slot == before and row % tile_rows:
                counts[-1] += 1
            else:
                starts.append(row)
                counts.append(1)
                owners.append(slot)
        before = slot
    return _cut(starts, counts, owners, row_slots.device)


def _cut(starts: list[int], counts: list[int], owners: list[int], device: torch.device) -> Cut:
    found = torch.tensor([starts, counts, owners], dtype=torch.int32, device=device)
    return found[0], found[1], found[2], torch.tensor([len(starts)], dtype=torch.int32, device=device)
