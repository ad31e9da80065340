"""Decode and chunk attention over scattered blocks against the reference, one query and one head at a time."""

import pytest
import torch
from torch import Tensor
from triton_cases import DEVICE, DTYPES, assert_near, error

from loraplex_kernels.gpu import attention as gpu
from loraplex_kernels.reference import attention as reference

BLOCK_SIZE, KV_HEADS, NUM_BLOCKS = 4, 2, 60
EVERYTHING = 1 << 20


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)


def paged(seq_lens: list[int], head_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """A cache of scattered blocks, with what is not a number in all cells of no sequence; its tables."""
    most = max(-(-length // BLOCK_SIZE) for length in seq_lens)
    order = torch.randperm(NUM_BLOCKS - 1) + 1  # block 0 stands where a sequence has none
    cache = torch.full((NUM_BLOCKS * BLOCK_SIZE, 2 * KV_HEADS * head_dim), float("nan"))
    table = torch.zeros(len(seq_lens), most, dtype=torch.int32)
    taken = 0
    for sequence, length in enumerate(seq_lens):
        count = -(-length // BLOCK_SIZE)
        table[sequence, :count] = order[taken : taken + count]
        taken += count
        for position in range(length):
            cell = int(table[sequence, position // BLOCK_SIZE]) * BLOCK_SIZE + position % BLOCK_SIZE
            cache[cell] = torch.randn(2 * KV_HEADS * head_dim)
    return cache.to(DEVICE, dtype), table.to(DEVICE), torch.tensor(seq_lens, dtype=torch.int32, device=DEVICE)


def queries_of(num_tokens: int, shared: int, head_dim: int, dtype: torch.dtype) -> Tensor:
    """Rows that stand apart, as in a qkv."""
    width = shared * KV_HEADS * head_dim
    return torch.randn(num_tokens, width + 6).to(DEVICE, dtype)[:, :width]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shared", "head_dim"), [(1, 16), (4, 16), (3, 24), (7, 80)])
@pytest.mark.parametrize("window", [1, 9, EVERYTHING])
def test_decoding_in_triton(dtype: torch.dtype, shared: int, head_dim: int, window: int) -> None:
    cache, table, seq_lens = paged([1, 5, 0, 37], head_dim, dtype)
    queries = queries_of(4, shared, head_dim, dtype)
    arguments = (queries, cache, table, seq_lens, BLOCK_SIZE, KV_HEADS, 0.3, window)
    ours = gpu.decode_attention(*arguments)
    assert_near(ours, reference.decode_attention(*arguments))
    assert not ours[2].any()


@pytest.mark.parametrize("num_splits", [1, 2, 8])
@pytest.mark.parametrize("cap", [None, 2.0])
@pytest.mark.parametrize("window", [20, EVERYTHING])
def test_however_the_keys_are_split(
    monkeypatch: pytest.MonkeyPatch, num_splits: int, cap: float | None, window: int
) -> None:
    monkeypatch.setattr(gpu, "_splits", lambda *_: num_splits)
    monkeypatch.setattr(gpu, "_keys", lambda *_: 16)
    cache, table, seq_lens = paged([70, 3, 1, 100], 16, torch.float32)
    arguments = (queries_of(4, 2, 16, torch.float32), cache, table, seq_lens, BLOCK_SIZE, KV_HEADS, 1.0, window, cap)
    assert_near(gpu.decode_attention(*arguments), reference.decode_attention(*arguments))


def starts_of(counts: list[int]) -> Tensor:
    return torch.tensor([0, *counts]).cumsum(0).int().to(DEVICE)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shared", "head_dim"), [(1, 16), (3, 24)])
@pytest.mark.parametrize("window", [5, EVERYTHING])
@pytest.mark.parametrize("cap", [None, 2.0])
def test_chunks_in_triton(dtype: torch.dtype, shared: int, head_dim: int, window: int, cap: float | None) -> None:
    counts = [1, 30, 7, 2]
    cache, table, seq_lens = paged([9, 30, 60, 2], head_dim, dtype)
    arguments = (queries_of(40, shared, head_dim, dtype), cache, table, starts_of(counts), seq_lens)
    ours = gpu.chunk_attention(*arguments, 30, BLOCK_SIZE, KV_HEADS, 0.3, window, cap)
    truth = reference.chunk_attention(*arguments, BLOCK_SIZE, KV_HEADS, 0.3, window, cap)
    assert_near(ours, truth)


def test_a_chunk_longer_than_a_tile_of_queries_and_a_block_of_keys() -> None:
    cache, table, seq_lens = paged([150, 70], 16, torch.float32)
    arguments = (queries_of(190, 2, 16, torch.float32), cache, table, starts_of([120, 70]), seq_lens)
    for window in (33, EVERYTHING):
        ours = gpu.chunk_attention(*arguments, 120, BLOCK_SIZE, KV_HEADS, 0.3, window)
        assert_near(ours, reference.chunk_attention(*arguments, BLOCK_SIZE, KV_HEADS, 0.3, window))


def test_one_query_is_the_same_by_either_kernel() -> None:
    cache, table, seq_lens = paged([7, 40], 16, torch.float32)
    queries = queries_of(2, 3, 16, torch.float32)
    decoded = gpu.decode_attention(queries, cache, table, seq_lens, BLOCK_SIZE, KV_HEADS, 0.3, 11)
    chunked = gpu.chunk_attention(queries, cache, table, starts_of([1, 1]), seq_lens, 1, BLOCK_SIZE, KV_HEADS, 0.3, 11)
    assert_near(decoded, chunked)


def test_a_wrong_block_is_noticed() -> None:
    cache, table, seq_lens = paged([21, 40], 16, torch.float32)
    queries = queries_of(2, 2, 16, torch.float32)
    truth = reference.decode_attention(queries, cache, table, seq_lens, BLOCK_SIZE, KV_HEADS, 1.0, EVERYTHING)
    for place in range(10):
        wrong = table.clone()
        wrong[1, place] = table[0, 0]
        ours = gpu.decode_attention(queries, cache, wrong, seq_lens, BLOCK_SIZE, KV_HEADS, 1.0, EVERYTHING)
        assert error(ours[:1], truth[:1]) < 2e-5 and error(ours[1:], truth[1:]) > 1e-3, place


def test_a_missing_mask_is_noticed() -> None:
    """A query sees a key beyond its window, or not its own, or cells beyond the sequence, within its last block."""
    cache, table, seq_lens = paged([21, 39], 16, torch.float32)
    queries, starts = queries_of(10, 2, 16, torch.float32), starts_of([4, 6])

    def ours(lengths: Tensor, window: int) -> Tensor:
        found = gpu.chunk_attention(queries, cache, table, starts, lengths, 6, BLOCK_SIZE, KV_HEADS, 1.0, window)
        return found.nan_to_num(1e9)

    truth = reference.chunk_attention(queries, cache, table, starts, seq_lens, BLOCK_SIZE, KV_HEADS, 1.0, 9)
    assert error(ours(seq_lens, 9), truth) < 2e-5
    assert error(ours(seq_lens, 10), truth) > 1e-3
    assert error(ours(seq_lens - 1, 9), truth) > 1e-3
    assert error(ours(seq_lens + 1, 9), truth) > 1e-3
