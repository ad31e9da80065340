"""Plain weights as a weight format."""

import pytest
import torch

from loraplex_quant.method import QuantMethod
from loraplex_quant.unquantized import Unquantized


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("sizes", [(6,), (6, 2, 3)])
def test_fused_linears_give_their_outputs_side_by_side(
    has_bias: bool, dtype: torch.dtype, sizes: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    method: QuantMethod = Unquantized(dtype, torch.device("cpu"), has_bias)
    parts = [{s.suffix: torch.randn(s.shape) for s in method.create_weights(8, size)} for size in sizes]
    assert all(set(part) == ({"weight", "bias"} if has_bias else {"weight"}) for part in parts)
    method.finish_load(parts)
    x, addend = torch.randn(4, 8, dtype=dtype), torch.randn(4, sum(sizes), dtype=dtype)
    truth = torch.cat([x.float() @ part["weight"].T + part.get("bias", torch.zeros(())) for part in parts], -1)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    with torch.inference_mode():
        assert (method.apply(x) - truth).abs().max() < tolerance
        assert (method.apply(x, addend) - (truth + addend)).abs().max() < tolerance
    assert method.num_bytes == sum(sizes) * (9 if has_bias else 8) * dtype.itemsize


def test_a_loaded_weight_is_a_copy() -> None:
    method = Unquantized(torch.float32, torch.device("cpu"), True)
    part = {"weight": torch.randn(3, 4), "bias": torch.randn(3)}
    method.finish_load([part])
    before = method.apply(torch.ones(1, 4)).clone()
    part["weight"].zero_()
    part["bias"].zero_()
    assert torch.equal(method.apply(torch.ones(1, 4)), before)
