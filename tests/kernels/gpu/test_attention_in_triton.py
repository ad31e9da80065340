"""Decode and chunk attention over scattered blocks against the reference, one query and one head at a time."""

import pytest
import torch
from rank_pages import delta_of
from torch import Tensor
from triton_cases import DEVICE, DTYPES, assert_near, error

from loraplex_kernels.gpu import attention as gpu
from loraplex_kernels.gpu.attention_tiles import H100_SHARED_BYTES, ChunkTile, fitting_tile
from loraplex_kernels.kv_cache import HeadNorms
from loraplex_kernels.reference import attention as reference
from loraplex_kernels.reference.kv_cache import rotate_and_store

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


@pytest.mark.parametrize(
    ("num_splits", "at_once", "cap", "window"),
    [(1, 1, None, 20), (1, 1, 2.0, EVERYTHING), (2, 2, 2.0, 20), (8, 8, None, EVERYTHING), (8, 2, 2.0, EVERYTHING)],
)
def test_however_the_keys_are_split(
    monkeypatch: pytest.MonkeyPatch, num_splits: int, at_once: int, cap: float | None, window: int
) -> None:
    monkeypatch.setattr(gpu, "_splits", lambda *_: num_splits)
    monkeypatch.setattr(gpu, "decode_keys", lambda *_: 16)
    monkeypatch.setattr(gpu, "MOST_AT_ONCE", at_once * 4 * 16)
    cache, table, seq_lens = paged([70, 3, 1, 100], 16, torch.float32)
    arguments = (queries_of(4, 3, 16, torch.float32), cache, table, seq_lens, BLOCK_SIZE, KV_HEADS, 1.0, window, cap)
    counters, out = counters_and_room(4 * KV_HEADS, 4, 3 * KV_HEADS * 16)
    for _ in range(2):  # the second time with what the first has left
        gpu.decode_attention(*arguments, counters, out)
        assert_near(out, reference.decode_attention(*arguments))
        assert not counters.any()


def counters_and_room(num_counters: int, num_rows: int, width: int) -> tuple[Tensor, Tensor]:
    """Counters at zero, and rows that stand apart."""
    room = torch.full((num_rows, width + 8), float("nan"), device=DEVICE)
    return torch.zeros(num_counters, dtype=torch.int32, device=DEVICE), room[:, :width]


def test_parts_joined_too_early_or_never_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A counter that stood too high or too low: its head is joined without its last parts, or by nobody."""
    monkeypatch.setattr(gpu, "_splits", lambda *_: 4)
    monkeypatch.setattr(gpu, "decode_keys", lambda *_: 16)
    # A head that is joined too early reads parts that nobody has written: what memory held must not decide.
    monkeypatch.setattr(torch, "empty", torch.zeros)
    cache, table, seq_lens = paged([64, 64], 16, torch.float32)
    arguments = (queries_of(2, 2, 16, torch.float32), cache, table, seq_lens, BLOCK_SIZE, KV_HEADS, 1.0, EVERYTHING)
    truth = reference.decode_attention(*arguments)
    for wrong in (2, -1):
        counters, out = counters_and_room(2 * KV_HEADS, 2, 2 * KV_HEADS * 16)
        counters[1] = wrong
        ours = gpu.decode_attention(*arguments, None, counters, out).nan_to_num(1e9)
        assert error(ours[1], truth[1]) < 2e-5
        assert error(ours[0, :32], truth[0, :32]) < 2e-5 and error(ours[0, 32:], truth[0, 32:]) > 1e-3


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


@pytest.mark.parametrize(
    ("rows", "keys", "window"), [(64, 16, 7), (64, 16, 33), (32, 32, 90), (32, 64, EVERYTHING), (128, 16, EVERYTHING)]
)
def test_chunks_longer_than_tiles_of_queries_and_of_keys(
    monkeypatch: pytest.MonkeyPatch, rows: int, keys: int, window: int
) -> None:
    """Tiles whose keys are all seen, and those at either border of what their rows see."""
    monkeypatch.setattr(gpu, "chunk_tile", lambda *_: ChunkTile(rows, keys, 4))
    cache, table, seq_lens = paged([150, 70], 16, torch.float32)
    arguments = (queries_of(190, 2, 16, torch.float32), cache, table, starts_of([120, 70]), seq_lens)
    ours = gpu.chunk_attention(*arguments, 120, BLOCK_SIZE, KV_HEADS, 0.3, window)
    assert_near(ours, reference.chunk_attention(*arguments, BLOCK_SIZE, KV_HEADS, 0.3, window))


def test_tiles_fit_into_what_a_processor_has() -> None:
    large, an_l4 = H100_SHARED_BYTES, 99 * 1024
    assert fitting_tile(128, 2, large) == ChunkTile(128, 128, 8)
    assert fitting_tile(256, 2, large) == ChunkTile(128, 64, 8)
    assert fitting_tile(128, 2, an_l4) == ChunkTile(128, 64, 8)
    assert fitting_tile(256, 2, an_l4) == ChunkTile(64, 32, 8)
    assert fitting_tile(128, 4, large) == ChunkTile(32, 64, 8)
    assert fitting_tile(256, 4, large) == ChunkTile(16, 16, 4)


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


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("head_dim", "turned", "parts", "has_norms", "are_neighbours", "cap", "window"),
    [
        (16, 16, None, False, False, None, EVERYTHING),
        (16, 16, 3, True, False, 2.0, EVERYTHING),
        (24, 8, 1, False, False, None, 9),
        (24, 24, 3, False, True, None, 1),
    ],
)
def test_decodes_that_turn_and_store_as_they_attend(
    dtype: torch.dtype, head_dim: int, turned: int, parts: int | None, has_norms: bool, are_neighbours: bool,
    cap: float | None, window: int, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The reference: turning and storing, then decoding. The row without a sequence gives zeros and stores nothing."""
    monkeypatch.setattr(gpu, "_splits", lambda *_: 4)
    monkeypatch.setattr(gpu, "decode_keys", lambda *_: 16)
    lengths, shared = [5, 33, 0, 70, 1], 3
    given, table, seq_lens = paged(lengths, head_dim, dtype)
    cells = torch.tensor(
        [int(table[i, (n - 1) // BLOCK_SIZE]) * BLOCK_SIZE + (n - 1) % BLOCK_SIZE for i, n in enumerate(lengths)]
    ).to(DEVICE)
    cells[2] = 0
    given[cells[seq_lens > 0]] = float("nan")  # what only this step stores
    sizes = tuple(count * head_dim for count in (shared * KV_HEADS, KV_HEADS, KV_HEADS))
    qkv = torch.randn(5, sum(sizes)).to(DEVICE, dtype)
    half = torch.randn(5, turned // 2)
    cos = torch.cat((half.cos(), half.cos()), -1).to(DEVICE, dtype)
    sin = torch.cat((-half.sin(), half.sin()), -1).to(DEVICE, dtype)
    norms = HeadNorms(*(torch.randn(size).to(DEVICE, dtype) for size in sizes[:2]), 1e-5) if has_norms else None
    delta = None if parts is None else delta_of(sizes if parts == 3 else (sum(sizes),), dtype)
    cache, true_cache, true_qkv = given.clone(), given.clone(), qkv.clone()
    arguments = (table, seq_lens)
    ours = gpu.turn_and_decode(
        qkv, cos, sin, cache, cells, *arguments, shared * KV_HEADS, head_dim, BLOCK_SIZE, KV_HEADS, 0.3, window, cap,
        delta, norms, are_neighbours=are_neighbours,
    )  # fmt: skip
    rotate_and_store(
        true_qkv, cos, sin, true_cache, cells, shared * KV_HEADS, head_dim, delta, norms, are_neighbours=are_neighbours
    )
    truth = reference.decode_attention(
        true_qkv[:, : sizes[0]], true_cache, *arguments, BLOCK_SIZE, KV_HEADS, 0.3, window, cap
    )
    assert_near(ours, truth)
    own = cells[seq_lens > 0]
    assert_near(cache[own], true_cache[own])
    cache[own], given[own] = 0, 0
    assert torch.equal(cache.nan_to_num(7), given.nan_to_num(7))
