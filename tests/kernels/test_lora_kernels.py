"""lora_shrink and lora_expand against the token-by-token reference, for the ways adapters mix."""

import pytest
import torch

from loraplex_kernels.cpu.linear import FEW_ROWS
from loraplex_kernels.cpu.lora import MIN_LONG_SEGMENT
from loraplex_kernels.linear import linear, pack_weight
from loraplex_kernels.lora import Deltas, LoraSegments, LoraTable, lora_expand, lora_shrink
from loraplex_kernels.reference.lora import lora_delta

TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}
IN_SIZE = 24
PARTS = (40, 8, 8)
CPU = torch.device("cpu")
# By slot, the rank of each part; 0: the adapter does not touch it.
RANKS = {0: (8, 8, 8), 1: (3, 0, 5), 2: (16, 1, 0), 3: (1, 2, 4), 5: (0, 7, 0)}
LONG = MIN_LONG_SEGMENT
# Slot and number of tokens of each segment.
MIXES = {
    "identical": [(0, 12)],
    "distinct": [(0, 1), (1, 1), (2, 1), (3, 1), (5, 1)],
    "uniform": [(0, 3), (1, 3), (2, 3), (3, 3)],
    "skewed": [(0, 20), (1, 1), (2, 1)],
    "with base between": [(-1, 2), (0, 2), (-1, 1), (3, 1), (-1, 3)],
    "base only": [(-1, 2)],
    "an empty slot": [(4, 2), (0, 1)],
    "one token": [(2, 1)],
    "long": [(1, LONG), (2, LONG + 1)],
    "long beside short": [(0, LONG - 1), (2, LONG + 7), (-1, LONG), (3, 1)],
    "no tokens between": [(0, 2), (1, 0), (2, 2)],
}


def table_of(ranks: dict[int, tuple[int, ...]], dtype: torch.dtype) -> LoraTable:
    table = LoraTable(6, PARTS, dtype, CPU)
    for slot, by_part in ranks.items():
        for part, rank in enumerate(by_part):
            if rank:
                a, b = torch.randn(rank, IN_SIZE) / 5, torch.randn(PARTS[part], rank) / 4
                table.set(slot, part, a.to(dtype), b.to(dtype))
    return table


def segments_of(mix: list[tuple[int, int]]) -> LoraSegments:
    starts = [0]
    for _, count in mix:
        starts.append(starts[-1] + count)
    return LoraSegments(starts, [slot for slot, _ in mix])


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("mix", MIXES)
def test_each_token_gets_the_delta_of_its_own_adapter(dtype: torch.dtype, mix: str) -> None:
    torch.manual_seed(0)
    table, segments = table_of(RANKS, dtype), segments_of(MIXES[mix])
    num_tokens = sum(count for _, count in MIXES[mix])
    x, out = torch.randn(num_tokens, IN_SIZE, dtype=dtype), torch.randn(num_tokens, sum(PARTS), dtype=dtype)
    truth = out.float() + lora_delta(x, table, segments)
    ours = out.clone()
    with torch.inference_mode():
        lora_expand(lora_shrink(x, table, segments), table, segments, ours)
    assert ours.dtype == dtype
    assert (ours.float() - truth).abs().max() <= TOLERANCES[dtype] * float(truth.abs().max())
    without = torch.ones(num_tokens, dtype=torch.bool)
    for start, end, slot in segments.all:
        without[start:end] = slot == 4
    assert torch.equal(ours[without], out[without])


def test_the_reference_is_the_formula() -> None:
    table = LoraTable(1, (3, 2), torch.float32, CPU)
    a, b = torch.randn(2, 4), torch.randn(2, 2)
    table.set(0, 1, a, b)
    x = torch.randn(5, 4)
    delta = lora_delta(x, table, LoraSegments((0, 5), (0,)))
    assert torch.allclose(delta, torch.cat((torch.zeros(5, 3), x @ a.T @ b.T), 1), atol=1e-6)


@pytest.mark.parametrize("num_tokens", [1, MIN_LONG_SEGMENT])
def test_an_infinite_product_of_one_adapter_does_not_reach_the_tokens_of_another(num_tokens: int) -> None:
    table = LoraTable(2, (4,), torch.float32, CPU)
    table.set(0, 0, torch.full((1, 8), 3e38), torch.ones(4, 1))
    table.set(1, 0, torch.zeros(1, 8), torch.ones(4, 1))
    x, out = torch.full((2 * num_tokens, 8), 3e38), torch.zeros(2 * num_tokens, 4)
    segments = LoraSegments((0, num_tokens, 2 * num_tokens), (0, 1))
    lora_expand(lora_shrink(x, table, segments), table, segments, out)
    assert not out[:num_tokens].isfinite().any()
    assert torch.equal(out[num_tokens:], torch.zeros(num_tokens, 4))


def test_a_cleared_slot_adds_nothing_and_a_slot_set_anew_only_what_it_holds_now() -> None:
    table = table_of(RANKS, torch.float32)
    x, segments = torch.randn(2, IN_SIZE), LoraSegments((0, 2), (2,))
    assert table.max_rank == 16
    table.clear(2)
    assert table.max_rank == 8 and 2 not in table.slots
    out = torch.zeros(2, sum(PARTS))
    lora_expand(lora_shrink(x, table, segments), table, segments, out)
    assert not out.any()
    a, b = torch.randn(2, IN_SIZE), torch.randn(8, 2)
    table.set(2, 2, a, b)
    lora_expand(lora_shrink(x, table, segments), table, segments, out)
    assert not out[:, :48].any() and torch.allclose(out[:, 48:], x @ a.T @ b.T, atol=1e-5)


WIDE_IN, WIDE_PARTS = 96, (96, 48, 48)  # blocks of 64 outputs that two parts share


@pytest.mark.parametrize("mix", [name for name, mix in MIXES.items() if sum(count for _, count in mix) <= FEW_ROWS])
@pytest.mark.parametrize("has_addend", [False, True])
def test_deltas_added_within_the_product_equal_sums_in_float64(mix: str, has_addend: bool) -> None:
    torch.manual_seed(0)
    table, segments = LoraTable(6, WIDE_PARTS, torch.bfloat16, CPU), segments_of(MIXES[mix])
    num_tokens = sum(count for _, count in MIXES[mix])
    x, weight = torch.randn(num_tokens, WIDE_IN).bfloat16(), torch.randn(sum(WIDE_PARTS), WIDE_IN).bfloat16()
    truth = x.double() @ weight.double().T
    addend = torch.randn(num_tokens, sum(WIDE_PARTS)).bfloat16() if has_addend else None
    truth += 0 if addend is None else addend.double()
    for slot, by_part in (RANKS | {4: (35, 0, 20)}).items():
        for part, rank in enumerate(by_part):
            if rank:
                a, b = torch.randn(rank, WIDE_IN).bfloat16(), torch.randn(WIDE_PARTS[part], rank).bfloat16()
                table.set(slot, part, a, b)
                first = sum(WIDE_PARTS[:part])
                for start, end, owner in segments.all:
                    if owner == slot:
                        delta = x[start:end].double() @ a.double().T @ b.double().T
                        truth[start:end, first : first + len(b)] += delta
    with torch.inference_mode():
        ours = linear(x, pack_weight(weight), None, addend, Deltas(table, segments))
    # One rounding to 8 bits, of a sum whose terms were rounded to 24.
    assert ((ours.double() - truth).abs() <= truth.abs() * 2**-8 + 1e-2).all()
