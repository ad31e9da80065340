"""Linear layers over whole numbers of 8 and 4 bits, at few rows and at many, against plain torch in float64."""

import pytest
import torch

from loraplex_kernels.cpu.small_int import FEW_ROWS
from loraplex_kernels.reference.small_int import int4_weight
from loraplex_kernels.small_int import (
    int4_linear,
    int8_linear,
    is_int4_kept,
    is_int8_kept,
    pack_int4,
    pack_int8,
    unpack_int4,
    unpack_int8,
)

CPU = torch.device("cpu")
BF16 = torch.bfloat16
# One rounding to bfloat16, and one more for each thing that is added; of weights too where they are widened.
TOLERANCE = 4 * 2**-8


def numbers(*shape: int, low: int, high: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(1)).to(dtype)


def random(*shape: int, seed: int = 2) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def check(out: torch.Tensor, truth: torch.Tensor) -> None:
    assert (out.double() - truth).abs().max() < TOLERANCE * truth.abs().max()


@pytest.mark.parametrize("num_rows", [1, 2, 3, 7, FEW_ROWS, FEW_ROWS + 1, 40])
@pytest.mark.parametrize(("out_size", "in_size"), [(64, 70), (192, 96)])
@pytest.mark.parametrize("with_more", [False, True])
def test_products_with_8_bits(num_rows: int, out_size: int, in_size: int, with_more: bool) -> None:
    weight, scales = numbers(out_size, in_size, low=-127, high=128, dtype=torch.int8), random(out_size).abs()
    x = random(num_rows, in_size, seed=3).to(BF16)
    bias, addend = random(out_size, seed=4).to(BF16), random(num_rows, out_size, seed=5).to(BF16)
    truth = x.double() @ (weight.double() * scales.double()[:, None]).T
    if not with_more:
        check(int8_linear(x, pack_int8(weight), scales), truth)
        return
    check(int8_linear(x, pack_int8(weight), scales, bias, addend), truth + bias.double() + addend.double())


@pytest.mark.parametrize("group_size", [2, 32, 128, 256])
@pytest.mark.parametrize("out_size", [64, 192])
@pytest.mark.parametrize("num_rows", [1, 2, 5, FEW_ROWS, FEW_ROWS + 1, 130])
@pytest.mark.parametrize("with_more", [False, True])
def test_products_with_4_bits(num_rows: int, out_size: int, group_size: int, with_more: bool) -> None:
    packed = pack_int4(weight := numbers(out_size, 256, low=0, high=16, dtype=torch.uint8))
    groups = random(256 // group_size, out_size, 2).to(BF16)
    x = random(num_rows, 256, seed=3).to(BF16)
    bias, addend = random(out_size, seed=4).to(BF16), random(num_rows, out_size, seed=5).to(BF16)
    truth = x.double() @ int4_weight(weight, groups).double().T
    if not with_more:
        check(int4_linear(x, packed, groups), truth)
        return
    check(int4_linear(x, packed, groups, bias, addend), truth + bias.double() + addend.double())


def test_packed_numbers_can_be_had_again() -> None:
    signed = numbers(128, 70, low=-127, high=128, dtype=torch.int8)
    assert torch.equal(unpack_int8(pack_int8(signed)), signed)
    small = numbers(128, 70, low=0, high=16, dtype=torch.uint8)
    assert torch.equal(unpack_int4(pack_int4(small)), small)


def test_a_row_gives_the_same_whatever_rows_are_beside_it() -> None:
    packed = pack_int4(numbers(64, 64, low=0, high=16, dtype=torch.uint8))
    x, groups = random(FEW_ROWS, 64, seed=3).to(BF16), random(2, 64, 2).to(BF16)
    together = int4_linear(x, packed, groups)
    for row in range(FEW_ROWS):
        assert torch.equal(together[row : row + 1], int4_linear(x[row : row + 1], packed, groups))


def test_what_has_no_kernel_is_not_kept() -> None:
    assert is_int8_kept(128, BF16, CPU)
    assert not is_int8_kept(128, torch.float32, CPU)
    assert not is_int8_kept(96, BF16, CPU)
    assert is_int4_kept(64, 96, 32, BF16, CPU)
    assert not is_int4_kept(64, 96, 32, torch.float32, CPU)
    assert not is_int4_kept(96, 96, 32, BF16, CPU)
    assert not is_int4_kept(64, 96, 64, BF16, CPU)
    assert not is_int4_kept(64, 96, 3, BF16, CPU)
