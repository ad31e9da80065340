"""Prompts by FlashInfer's stand-in: what our calls say of a step is all that it computes from."""

from typing import Any

import numpy as np
import pytest
import torch
from flashinfer_stand_in import BatchPrefillWithPagedKVCacheWrapper, FlashInferStandIn
from torch import Tensor
from triton_cases import assert_near, error
from triton_interpreter import needs_interpreter

from loraplex_kernels import flashinfer_prompts
from loraplex_kernels.flashinfer_prompts import AttentionSizes, FlashInferError, HostChunks, PromptAttention
from loraplex_kernels.reference import attention as reference

pytestmark = needs_interpreter

BLOCK_SIZE, CPU = 4, torch.device("cpu")
SIZES = AttentionSizes(num_heads=6, num_kv_heads=2, head_dim=8, scale=0.3, cap=None, dtype=torch.float32)
# Two decodes, then chunks: one that is all of its prompt, one after many keys, one that ends with its block.
COUNTS, SEQ_LENS = [1, 1, 5, 7, 3], [3, 11, 5, 30, 16]


def step() -> tuple[Tensor, Tensor, HostChunks, tuple[Tensor, ...]]:
    """Queries, a cache of scattered blocks, what the host knows of the chunks, and all of it as tensors."""
    torch.manual_seed(0)
    table = torch.randperm(60)[: len(COUNTS) * 8].view(len(COUNTS), 8).int()
    starts = torch.tensor([0, *COUNTS]).cumsum(0).int()
    lengths = torch.tensor(SEQ_LENS, dtype=torch.int32)
    cache = torch.randn(60 * BLOCK_SIZE, 2 * 2 * 8)
    queries = torch.randn(sum(COUNTS), 6 * 8 + 5)[:, : 6 * 8]  # rows that stand apart, as in a qkv
    chunks = HostChunks(starts[2:].numpy(), lengths[2:].numpy(), table[2:].numpy())
    return queries[2:], cache, chunks, (table[2:], starts[2:] - 2, lengths[2:])


def ours_and_truth(window: int | None, cap: float | None) -> tuple[Tensor, Tensor]:
    queries, cache, chunks, on_device = step()
    sizes = AttentionSizes(6, 2, 8, 0.3, cap, torch.float32)
    ours = torch.full((len(queries), 6 * 8), float("nan"))
    PromptAttention(sizes, CPU).plan(chunks, BLOCK_SIZE, window).run(queries, cache, ours)
    return ours, reference.chunk_attention(queries, cache, *on_device, BLOCK_SIZE, 2, 0.3, window or 1 << 30, cap)


@pytest.mark.parametrize("window", [None, 1, 6])
@pytest.mark.parametrize("cap", [None, 2.0])
def test_chunks_attend_as_by_the_reference(
    monkeypatch: pytest.MonkeyPatch, window: int | None, cap: float | None
) -> None:
    FlashInferStandIn(monkeypatch)
    assert_near(*ours_and_truth(window, cap))


@pytest.mark.parametrize("name", ["qo_indptr", "paged_kv_indices", "paged_kv_last_page_len", "window_left", "sm_scale"])
def test_a_step_that_is_told_wrongly_is_noticed(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    FlashInferStandIn(monkeypatch)
    plan = BatchPrefillWithPagedKVCacheWrapper.plan

    def told_wrongly(self: Any, **said: Any) -> None:
        match name:
            case "qo_indptr":
                said[name][1] += 1
            case "paged_kv_indices":
                said[name] = said[name].roll(1)
            case "paged_kv_last_page_len":
                said[name][1] -= 1
                said["seq_lens"][1] -= 1
            case _:
                said[name] += 1
        plan(self, **said)

    monkeypatch.setattr(BatchPrefillWithPagedKVCacheWrapper, "plan", told_wrongly)
    assert error(*ours_and_truth(6, None)) > 1e-3


def test_a_window_has_its_own_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    library = FlashInferStandIn(monkeypatch)
    queries, cache, chunks, on_device = step()
    attention = PromptAttention(SIZES, CPU)
    for _ in range(2):
        planned = {window: attention.plan(chunks, BLOCK_SIZE, window) for window in (None, 6)}
        for window, one in planned.items():
            ours = torch.empty(len(queries), 6 * 8)
            one.run(queries, cache, ours)
            truth = reference.chunk_attention(queries, cache, *on_device, BLOCK_SIZE, 2, 0.3, window or 1 << 30)
            assert_near(ours, truth)
    assert len(library.wrappers) == 2


def test_what_flashinfer_cannot_serve_is_refused() -> None:
    def refusal(**changed: Any) -> str:
        settings = {"head_dim": 128, "dtype": torch.bfloat16, **changed}
        with pytest.raises(FlashInferError) as refused:
            PromptAttention(AttentionSizes(num_heads=8, num_kv_heads=8, scale=1.0, cap=None, **settings), CPU)
        return str(refused.value)

    assert refusal(head_dim=80) == "its kernels have heads of 64, 128, 256 elements, this model of 80"
    assert "float16 and bfloat16, this model in torch.float32 (--dtype)" in refusal(dtype=torch.float32)
    assert "not installed (pip install 'loraplex[flashinfer]')" in refusal()


def test_blocks_of_no_sequence_are_not_named(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[list[int]] = []
    FlashInferStandIn(monkeypatch)
    monkeypatch.setattr(
        BatchPrefillWithPagedKVCacheWrapper,
        "plan",
        lambda self, **given: said.append(given["paged_kv_indices"].tolist()),
    )
    table = np.array([[7, 99, 99], [5, 6, 99]], np.int32)
    chunks = HostChunks(np.array([0, 4, 5], np.int32), np.array([4, 5], np.int32), table)
    flashinfer_prompts.PromptAttention(SIZES, CPU).plan(chunks, BLOCK_SIZE, None)
    assert said == [[7, 5, 6]]
