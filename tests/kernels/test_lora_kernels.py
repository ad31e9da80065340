"""lora_shrink and lora_expand against a five-line loop over segments, for the ways adapters mix."""

import pytest
import torch
from torch import Tensor

from loraplex_kernels.lora import LoraLayout, choose_layout, lora_expand, lora_shrink, pack_lora
from loraplex_kernels.reference import lora as reference

TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
RANKS = {0: 8, 1: 3, 2: 16, 3: 1}
MIXES = {
    "identical": [0] * 12,
    "distinct": [0, 1, 2, 3],
    "uniform": [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3],
    "skewed": [0] * 20 + [1, 2],
    "with base": [-1, -1, 0, 0, 3],
    "base only": [-1, -1],
    "one token": [2],
}


def delta_by_segment(x: Tensor, token_slots: Tensor, weights: dict[int, tuple[Tensor, Tensor]], out: Tensor) -> Tensor:
    out = out.clone()
    for slot, (a, b) in weights.items():
        tokens = token_slots == slot
        out[tokens] += (x[tokens] @ a.T) @ b
    return out


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("implementation", ["small", "large", "reference"])
def test_each_token_gets_the_delta_of_its_own_adapter(dtype: torch.dtype, mix: str, implementation: str) -> None:
    torch.manual_seed(0)
    token_slots = torch.tensor(MIXES[mix])
    x, out = torch.randn(len(token_slots), 24, dtype=dtype), torch.randn(len(token_slots), 40, dtype=dtype)
    weights = {
        slot: (torch.randn(rank, 24, dtype=dtype) / 5, torch.randn(rank, 40, dtype=dtype) / 4)
        for slot, rank in RANKS.items()
    }
    row_slots = torch.tensor([slot for slot, rank in RANKS.items() for _ in range(rank)])
    a, b = torch.cat([a for a, _ in weights.values()]), torch.cat([b for _, b in weights.values()])
    foreign = token_slots.unsqueeze(1) != row_slots
    truth = delta_by_segment(x, token_slots, weights, out)
    with torch.inference_mode():
        if implementation != "reference":
            a, b = pack_lora(a, b, LoraLayout(implementation))
            ours = lora_expand(lora_shrink(x, a, foreign), b, out.clone())
        else:
            ours = reference.lora_expand(reference.lora_shrink(x, a, foreign), b, out.clone())
    assert ours.dtype == dtype
    assert (ours.float() - truth.float()).abs().max() <= TOLERANCES[dtype] * float(truth.float().abs().max())
    without = token_slots == -1
    assert torch.equal(ours[without], out[without])


@pytest.mark.parametrize("layout", LoraLayout)
def test_without_a_mask_all_ranks_are_every_tokens(layout: LoraLayout) -> None:
    x, a, b = torch.randn(3, 8), torch.randn(2, 8), torch.randn(2, 5)
    with torch.inference_mode():
        packed_a, packed_b = pack_lora(a, b, layout)
        ours = lora_expand(lora_shrink(x, packed_a, None), packed_b, torch.zeros(3, 5))
    assert torch.allclose(ours, x @ a.T @ b, atol=1e-5)


def test_little_work_and_much_work_have_layouts_of_their_own() -> None:
    assert choose_layout(1, 16, 576, 1536, torch.device("cpu")) is LoraLayout.SMALL
    assert choose_layout(512, 16, 576, 1536, torch.device("cpu")) is LoraLayout.LARGE


@pytest.mark.parametrize("layout", LoraLayout)
def test_an_infinite_product_of_a_foreign_rank_does_not_reach_the_token(layout: LoraLayout) -> None:
    x = torch.full((2, 8), 3e38)
    a = torch.cat((torch.full((1, 8), 3e38), torch.zeros(1, 8)))
    foreign = torch.tensor([[False, True], [True, False]])
    with torch.inference_mode():
        packed_a, packed_b = pack_lora(a, torch.ones(2, 4), layout)
        ours = lora_expand(lora_shrink(x, packed_a, foreign), packed_b, torch.zeros(2, 4))
    assert not ours[0].isfinite().any()
    assert torch.equal(ours[1], torch.zeros(4))
