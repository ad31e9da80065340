"""Plain weights as the simplest form in which a linear is kept."""

import pytest
import torch

from loraplex_quant.method import LinearWeight, QuantMethod
from loraplex_quant.unquantized import Unquantized

CPU = torch.device("cpu")


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("sizes", [(6,), (6, 2, 3)])
def test_fused_linears_give_their_outputs_side_by_side(
    has_bias: bool, dtype: torch.dtype, sizes: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    parts = [LinearWeight(torch.randn(size, 8), torch.randn(size) if has_bias else None) for size in sizes]
    method: QuantMethod = Unquantized(parts, dtype, CPU)
    x, addend = torch.randn(4, 8, dtype=dtype), torch.randn(4, sum(sizes), dtype=dtype)
    weight = torch.cat([part.weight for part in parts if isinstance(part.weight, torch.Tensor)])
    truth = x.float() @ weight.T
    if has_bias:
        truth += torch.cat([part.bias for part in parts if part.bias is not None])
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    with torch.inference_mode():
        assert (method.apply(x) - truth).abs().max() < tolerance
        assert (method.apply(x, addend) - (truth + addend)).abs().max() < tolerance
    assert method.num_bytes == sum(sizes) * (9 if has_bias else 8) * dtype.itemsize


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_weight_can_be_had_again(dtype: torch.dtype) -> None:
    weight = torch.randn(37, 70, generator=torch.Generator().manual_seed(3))
    method = Unquantized([LinearWeight(weight[:20]), LinearWeight(weight[20:])], dtype, CPU)
    again = method.dequantize()
    assert torch.equal(again, weight.to(dtype).float())
    again.zero_()
    assert torch.equal(method.dequantize(), weight.to(dtype).float())


def test_a_loaded_weight_is_a_copy() -> None:
    weight, bias = torch.randn(3, 4), torch.randn(3)
    method = Unquantized([LinearWeight(weight, bias)], torch.float32, CPU)
    before = method.apply(torch.ones(1, 4)).clone()
    weight.zero_()
    bias.zero_()
    assert torch.equal(method.apply(torch.ones(1, 4)), before)
