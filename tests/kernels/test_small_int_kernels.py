"""Linear layers over whole numbers of 8 and 4 bits, at few rows and at many, against plain torch in float64."""

import numba
import pytest
import torch

from loraplex_kernels.cpu.block_sums import half_sums_of, int4_sums_of, int8_sums_of
from loraplex_kernels.cpu.few_rows import INT4, BlockedWeight, product
from loraplex_kernels.cpu.pairs import FloatPairs, HalfPairs, best_pairs, multiplies_halves
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


@pytest.mark.parametrize("num_rows", [1, 2, 5, 8])
def test_sums_over_4_bits_are_as_exact_as_float32(num_rows: int) -> None:
    packed = pack_int4(weight := numbers(64, 1024, low=0, high=16, dtype=torch.uint8))
    groups = torch.stack((random(32, 64) * 0.01, random(32, 64, seed=7)), dim=-1).to(BF16)
    x = (random(num_rows, 1024, seed=3) + 3).to(BF16)
    blocked = BlockedWeight(INT4, packed.data_ptr(), 64, 1024, groups.data_ptr(), 32)
    truth = x.double() @ int4_weight(weight, groups).double().T
    assert (product(x, blocked, is_wide=True).double() - truth).abs().max() < 1e-5 * truth.abs().max()


PAIRS = [
    FloatPairs,
    pytest.param(HalfPairs, marks=pytest.mark.skipif(not multiplies_halves(), reason="no AVX512-BF16")),
]


@pytest.mark.parametrize("pairs", PAIRS)
def test_a_processor_without_products_of_bfloat16_gets_the_same_sums(pairs: type) -> None:
    int4_sums, int8_sums, half_sums = (sums_of(2, pairs) for sums_of in (int4_sums_of, int8_sums_of, half_sums_of))

    @numba.njit
    def run(x, int4_block, groups, input_sums, int4_out, int8_block, scales, int8_out, half_block, half_out):  # type: ignore[no-untyped-def]
        int4_sums(x, 2 * 96, int4_block, 3, 16, groups, 4 * 64, input_sums, int4_out)
        int8_sums(x, 2 * 96, int8_block, 48, scales, int8_out)
        half_sums(x, 2 * 96, half_block, 48, half_out)

    packed = pack_int4(weight := numbers(64, 96, low=0, high=16, dtype=torch.uint8))
    groups, x = random(3, 64, 2).to(BF16), random(2, 96, seed=3).to(BF16)
    packed8 = pack_int8(weight8 := numbers(64, 96, low=-127, high=128, dtype=torch.int8))
    scales = random(64, seed=6)
    whole = random(64, 96, seed=4).to(BF16)
    # As oneDNN lays it out, on a cache line: [in / 2, 64, 2].
    room = torch.empty(64 * 96 + 32, dtype=BF16)
    blocked = room[-room.data_ptr() % 64 // 2 :][: 64 * 96].view(48, 64, 2)
    blocked.copy_(whole.view(64, 48, 2).transpose(0, 1))
    input_sums = x.float().view(2, 3, 32).sum(-1)
    int4_out, int8_out, half_out = torch.empty(3, 2, 64)
    tensors = (x, packed, groups, input_sums, int4_out, packed8, scales, int8_out, blocked, half_out)
    run(*(tensor.data_ptr() for tensor in tensors))
    whole8 = weight8 * scales[:, None]
    for out, truth in ((int4_out, int4_weight(weight, groups)), (int8_out, whole8), (half_out, whole)):
        expected = x.double() @ truth.double().T
        assert (out.double() - expected).abs().max() < 1e-5 * expected.abs().max()


def test_the_form_of_sums_follows_the_processor_that_is_compiled_for(monkeypatch: pytest.MonkeyPatch) -> None:
    for features, pairs in (("+avx2,+fma", FloatPairs), ("+avx512bf16", HalfPairs)):
        monkeypatch.setattr(numba.config, "CPU_FEATURES", features)
        assert best_pairs() is pairs


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
    assert is_int8_kept(128, 30, BF16, CPU)
    assert not is_int8_kept(128, 31, BF16, CPU)
    assert not is_int8_kept(128, 30, torch.float32, CPU)
    assert not is_int8_kept(96, 30, BF16, CPU)
    assert is_int4_kept(64, 96, 32, BF16, CPU)
    assert not is_int4_kept(64, 96, 32, torch.float32, CPU)
    assert not is_int4_kept(96, 96, 32, BF16, CPU)
    assert not is_int4_kept(64, 96, 64, BF16, CPU)
    assert not is_int4_kept(64, 96, 3, BF16, CPU)
