"""Quantised linears in Triton against the reference and against the definition of GPTQ's and AWQ's numbers."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from triton_cases import DEVICE, DTYPES, assert_near, error

from loraplex_kernels.gpu import grouped_linear as gpu
from loraplex_kernels.grouped_linear import PackedGroups, pack_groups
from loraplex_kernels.reference import grouped_linear as reference
from loraplex_quant.grouped import GroupedWeight


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)


def quantized(
    bits: int, out_size: int, in_size: int, group_size: int, *, act_order: bool = False, symmetric: bool = False
) -> GroupedWeight:
    num_groups = -(-in_size // group_size)
    group_of = torch.arange(in_size) // group_size
    if act_order:
        group_of = group_of[torch.randperm(in_size)]
    zeros = torch.full((1, 1), 1 << (bits - 1)) if symmetric else torch.randint(0, 1 << bits, (out_size, num_groups))
    numbers = torch.randint(0, 1 << bits, (out_size, in_size), dtype=torch.uint8)
    scales = (torch.rand(out_size, num_groups) + 0.5) / (1 << bits)
    return GroupedWeight(bits, numbers, zeros, scales, group_of if act_order or in_size % group_size else None)


def packed(weight: GroupedWeight, dtype: torch.dtype) -> PackedGroups:
    return pack_groups(weight.numbers, weight.zeros, weight.scales, weight.group_of, weight.bits, dtype, DEVICE)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize(
    ("in_size", "group_size"), [(128, 128), (128, 32), (256, 16), (96, 8), (80, 32), (200, 200), (72, 24)]
)
def test_group_sizes_bits_and_act_order(bits: int, in_size: int, group_size: int, act_order: bool) -> None:
    weight = quantized(bits, 24, in_size, group_size, act_order=act_order)
    x = torch.randn(3, in_size, device=DEVICE)
    ours = gpu.grouped_linear(x, packed(weight, torch.float32))
    assert_near(ours, reference.grouped_linear(x, packed(weight, torch.float32)))
    assert_near(ours, x @ weight.dequantize().to(DEVICE).T)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("num_rows", [1, 17, 70])
@pytest.mark.parametrize("symmetric", [False, True])
def test_numbers_of_rows_and_odd_outputs(dtype: torch.dtype, bits: int, num_rows: int, symmetric: bool) -> None:
    weight = packed(quantized(bits, 77, 128, 64, act_order=True, symmetric=symmetric), dtype)
    wide = torch.randn(num_rows, 136).to(DEVICE, dtype)
    assert_near(gpu.grouped_linear(wide[:, :128], weight), reference.grouped_linear(wide[:, :128], weight))


@pytest.mark.parametrize("num_splits", [1, 2, 3, 9])
def test_however_the_inputs_of_a_quantised_linear_are_split(num_splits: int) -> None:
    weight = packed(quantized(4, 40, 600, 40), torch.float32)
    x, bias, addend = (torch.randn(*shape, device=DEVICE) for shape in ((2, 600), (40,), (2, 40)))
    ours = gpu.grouped_linear(x, weight, bias, addend, num_splits)
    assert_near(ours, reference.grouped_linear(x, weight, bias, addend))
    plain = x @ reference.dequantize(weight) + bias + addend
    assert_near(ours, plain)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize(("bits", "in_size", "group_size"), [(2, 200, 24), (4, 256, 128), (8, 96, 32)])
def test_many_rows_multiply_the_weight_written_out_part_by_part(
    bits: int, in_size: int, group_size: int, act_order: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "WIDE_BYTES", 4 * in_size * 32)  # two parts, the second not full
    weight = packed(quantized(bits, 45, in_size, group_size, act_order=act_order), torch.float32)
    monkeypatch.setattr(gpu, "MANY_ROWS", 5)
    x, bias, addend = (torch.randn(*shape, device=DEVICE) for shape in ((5, in_size), (45,), (5, 45)))
    for terms in ((None, None), (bias, addend)):
        assert_near(gpu.grouped_linear(x, weight, *terms), reference.grouped_linear(x, weight, *terms))


@pytest.mark.parametrize("num_rows", [16, 65])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_numbers_far_from_their_zero_stay_exact_in_half_precision(bits: int, num_rows: int) -> None:
    # GPTQ's zeros reach 2 ** bits; the largest differences must neither overflow nor lose their last bit.
    top = 1 << bits
    numbers = torch.randint(0, 2, (8, 256), dtype=torch.uint8) * (top - 1)
    places = torch.arange(num_rows) * 17 % 256  # every field of a word
    x = torch.zeros(num_rows, 256).index_put_((torch.arange(num_rows), places), torch.ones(())).to(DEVICE).half()
    for zero in (0, top):
        weight = pack_groups(numbers, torch.full((1, 1), zero), torch.ones(8, 2), None, bits, torch.float16, DEVICE)
        assert torch.equal(gpu.grouped_linear(x, weight), (numbers[:, places].t().half() - zero).to(DEVICE))


@pytest.mark.parametrize("num_rows", [1, 65])
@pytest.mark.parametrize("dtype", DTYPES)
def test_zeros_between_and_far_from_the_numbers(dtype: torch.dtype, num_rows: int) -> None:
    weight = quantized(4, 24, 128, 32)
    zeros = torch.rand(24, 4) * torch.tensor([16.0, 16.0, -40.0, 4096.0])  # as weights quantised on the way have them
    weight = replace(weight, zeros=zeros, scales=weight.scales / (1 + zeros.abs() / 16))
    x = torch.randn(num_rows, 128).to(DEVICE, dtype)
    assert_near(gpu.grouped_linear(x, packed(weight, dtype)), reference.grouped_linear(x, packed(weight, dtype)))


def changed(x: Tensor, weight: PackedGroups, faulty: PackedGroups) -> float:
    return error(gpu.grouped_linear(x, faulty), reference.grouped_linear(x, weight))


def test_a_wrong_order_group_zero_or_field_is_noticed() -> None:
    weight, x = packed(quantized(4, 24, 128, 32, act_order=True), torch.float32), torch.randn(2, 128, device=DEVICE)
    assert weight.order is not None and weight.group_of is None
    assert changed(x, weight, weight) < 2e-5
    assert changed(x, weight, replace(weight, order=None)) > 0.1
    assert changed(x, weight, replace(weight, order=weight.order.roll(1))) > 0.1
    assert changed(x, weight, replace(weight, scales=weight.scales.roll(1, 0))) > 0.02
    assert changed(x, weight, replace(weight, zeros=weight.zeros + 1)) > 0.02
    assert changed(x, weight, replace(weight, words=weight.words.roll(1, 0))) > 0.1


@pytest.mark.parametrize("num_rows", [2, 70, 257])
def test_a_wrong_word_group_or_zero_is_noticed_however_many_rows_there_are(num_rows: int) -> None:
    weight = packed(quantized(4, 24, 256, 128), torch.float32)
    x = torch.randn(num_rows, 256, device=DEVICE)
    assert weight.group_of is None
    assert changed(x, weight, weight) < 2e-5
    assert changed(x, weight, replace(weight, scales=weight.scales.roll(1, 0))) > 0.02
    assert changed(x, weight, replace(weight, zeros=weight.zeros.roll(1, 1))) > 0.02
    assert changed(x, weight, replace(weight, words=weight.words.roll(4, 0))) > 0.1
    upper = (weight.words >> 16) & 0xFFFF | weight.words << 16
    assert changed(x, weight, replace(weight, words=upper.contiguous())) > 0.1
