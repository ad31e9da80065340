"""The most likely token by Triton against the reference."""

import pytest
import torch
from triton_cases import DEVICE, DTYPES

from loraplex_kernels.gpu import choice as gpu
from loraplex_kernels.reference import choice as reference


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spread", [0.1, 3.0, 60.0])
@pytest.mark.parametrize("size", [5, 1001, 20_000])
def test_the_most_likely_token_in_triton(dtype: torch.dtype, spread: float, size: int) -> None:
    torch.manual_seed(0)
    logits = (torch.randn(4, size + 3) * spread).to(DEVICE, dtype)[:, :size]
    logits[1, ::2] = float("-inf")
    logits[2, [1, size // 2, size - 1]] = logits[2].max() + 1  # a tie
    token_ids, logprobs = gpu.most_likely(logits)
    true_ids, true_logprobs = reference.most_likely(logits)
    assert token_ids.tolist() == true_ids.tolist() and token_ids[2] == 1
    assert torch.allclose(logprobs, true_logprobs, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), None])
def test_a_broken_row_gives_no_token_in_triton(broken: float | None) -> None:
    logits = torch.randn(3, 50, device=DEVICE)
    if broken is None:
        logits[1] = float("-inf")
    else:
        logits[1, 49] = broken
    token_ids, logprobs = gpu.most_likely(logits)
    assert token_ids[1] == -1 and logprobs[1] == 0
    assert token_ids[[0, 2]].tolist() == logits[[0, 2]].argmax(1).tolist()


def test_a_column_left_out_is_noticed() -> None:
    logits = torch.zeros(1, 5000, device=DEVICE)
    logits[0, 4999] = 3.0
    assert gpu.most_likely(logits)[0].item() == 4999
    assert gpu.most_likely(logits[:, :-1])[0].item() == 0
