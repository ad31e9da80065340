"""Linear layers over whole numbers of 8 and 4 bits, at few rows and at many, against plain torch in float64."""

import pytest
import torch

from loraplex_kernels.cpu.small_int import MANY_ROWS_INT4, MANY_ROWS_INT8
from loraplex_kernels.reference.small_int import int4_weight
from loraplex_kernels.small_int import int4_linear, int8_linear, is_int4_kept, is_int8_kept, pack_int4, unpack_int4

CPU = torch.device("cpu")
BF16 = torch.bfloat16
# One rounding to bfloat16, and one more for each thing that is added.
TOLERANCE = 3 * 2**-8


def numbers(*shape: int, low: int, high: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(1)).to(dtype)


def random(*shape: int, seed: int = 2) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def check(out: torch.Tensor, truth: torch.Tensor) -> None:
    assert (out.double() - truth).abs().max() < TOLERANCE * truth.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, BF16, torch.float16])
@pytest.mark.parametrize("num_rows", [1, 3, MANY_ROWS_INT8, 40])
@pytest.mark.parametrize("in_size", [70, 96])
@pytest.mark.parametrize("with_more", [False, True])
def test_products_with_8_bits(num_rows: int, in_size: int, with_more: bool, dtype: torch.dtype) -> None:
    weight, scales = numbers(48, in_size, low=-127, high=128, dtype=torch.int8), random(48).abs().to(dtype)
    x = random(num_rows, in_size, seed=3).to(dtype)
    bias, addend = (random(48, seed=4).to(dtype), random(num_rows, 48, seed=5).to(dtype)) if with_more else (None, None)
    truth = x.double() @ (weight.double() * scales.double()[:, None]).T
    if bias is not None and addend is not None:
        truth += bias.double() + addend.double()
    check(int8_linear(x, weight, scales, bias, addend), truth)


@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("out_size", [16, 64, 80, 192])
@pytest.mark.parametrize("num_rows", [1, 5, MANY_ROWS_INT4, 130])
@pytest.mark.parametrize("with_more", [False, True])
def test_products_with_4_bits(num_rows: int, out_size: int, group_size: int, with_more: bool) -> None:
    packed = pack_int4(weight := numbers(out_size, 256, low=0, high=16, dtype=torch.uint8))
    groups = random(256 // group_size, out_size, 2).to(BF16)
    x = random(num_rows, 256, seed=3).to(BF16)
    bias, addend = (random(out_size, seed=4).to(BF16), random(num_rows, out_size, seed=5).to(BF16))
    truth = x.double() @ int4_weight(weight, groups).double().T
    if not with_more:
        check(int4_linear(x, packed, groups, group_size), truth)
        return
    truth += bias.double() + addend.double()
    check(int4_linear(x, packed, groups, group_size, bias, addend), truth)


@pytest.mark.parametrize("out_size", [16, 96, 176])
def test_packed_numbers_can_be_had_again(out_size: int) -> None:
    weight = numbers(out_size, 64, low=0, high=16, dtype=torch.uint8)
    groups = random(2, out_size, 2).to(BF16)
    truth = int4_weight(weight, groups)
    assert (unpack_int4(pack_int4(weight), groups, 32) - truth).abs().max() <= 2**-8 * truth.abs().max()


def test_rows_do_not_depend_on_the_others_of_their_batch() -> None:
    packed = pack_int4(numbers(64, 64, low=0, high=16, dtype=torch.uint8))
    groups, x = random(2, 64, 2).to(BF16), random(8, 64, seed=3).to(BF16)
    together = int4_linear(x, packed, groups, 32)
    assert torch.equal(together[3:4], int4_linear(x[3:4], packed, groups, 32))


def test_what_is_kept_in_small_numbers() -> None:
    assert is_int8_kept(96, BF16, CPU)
    assert not is_int8_kept(96, torch.float32, CPU)
    assert not is_int8_kept(70, BF16, CPU)
    assert is_int4_kept(32, 96, 32, BF16, CPU)
    assert not is_int4_kept(32, 96, 32, torch.float32, CPU)
    assert not is_int4_kept(24, 96, 32, BF16, CPU)
    assert not is_int4_kept(32, 96, 64, BF16, CPU)
    assert not is_int4_kept(32, 96, 16, BF16, CPU)
