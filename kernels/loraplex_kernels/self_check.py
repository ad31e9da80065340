"""Each kernel for GPUs against its plain torch twin, on the device that it is to run on.

A compiler, a driver or a new kind of GPU may make wrong numbers of right code, without a word. So this is asked where
the kernels run: by the engine's first start on a kind of GPU, and by bench/gpu.py.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from loraplex_kernels.gpu import activation, attention, choice, grouped_linear, kv_cache, lora, moe, norm
from loraplex_kernels.grouped_linear import pack_groups
from loraplex_kernels.lora_pages import PAGE_RANKS, LinearPages, RankPages, RowDelta, make_tiles, write_pages
from loraplex_kernels.moe_tiles import FEW_ROWS, ExpertTiles
from loraplex_kernels.norm import Norm
from loraplex_kernels.reference import activation as reference_activation
from loraplex_kernels.reference import attention as reference_attention
from loraplex_kernels.reference import choice as reference_choice
from loraplex_kernels.reference import grouped_linear as reference_grouped
from loraplex_kernels.reference import kv_cache as reference_kv_cache
from loraplex_kernels.reference import lora_pages as reference_lora
from loraplex_kernels.reference import moe_tiles as reference_moe
from loraplex_kernels.reference import norm as reference_norm

TOLERANCES = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 3e-2}
NO_WINDOW = 1 << 30
ADAPTER_RANKS = (8, 16, 64, 5)
BLOCK_SIZE = 16
NUM_EXPERTS, CHOSEN_EXPERTS = 8, 2


@dataclass(frozen=True, slots=True)
class ModelSizes:
    """The sizes of a model, or of a rank's part, for which its kernels are compiled."""

    hidden_size: int
    head_dim: int
    num_heads: int
    num_kv_heads: int
    vocab_size: int
    bits: tuple[int, ...] = ()  # of packed weights
    has_experts: bool = False


@dataclass(frozen=True, slots=True)
class Comparison:
    """One kernel's largest difference from its twin, in shares of the largest true number or of 1."""

    kernel: str
    error: float
    limit: float

    @property
    def is_near(self) -> bool:
        """False for differences that are no numbers, too."""
        return self.error <= self.limit


def difference(ours: Tensor, truth: Tensor) -> float:
    """The largest difference, in shares of the largest true number or of 1; no number where one is none."""
    return float((ours.float() - truth.float()).abs().max()) / max(1.0, float(truth.float().abs().max()))


def compare_kernels(device: torch.device, dtype: torch.dtype, sizes: ModelSizes) -> Iterator[Comparison]:
    """Compare every kernel that a model of these sizes runs, on random numbers of that type, the same for both."""
    generator = torch.Generator().manual_seed(0)

    def numbers(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator) * scale).to(device, dtype)

    for part in (_lora_pairs, _attention_pairs, _row_pairs, _packed_pairs, _expert_pairs):
        for kernel, ours, truth in part(sizes, numbers):
            if ours.shape != truth.shape:
                raise ValueError(f"{kernel}: shape {tuple(ours.shape)}, its twin's is {tuple(truth.shape)}")
            yield Comparison(kernel, difference(ours, truth), TOLERANCES[dtype])


Numbers = Callable[..., Tensor]
Pairs = Iterator[tuple[str, Tensor, Tensor]]


def _lora_pairs(sizes: ModelSizes, numbers: Numbers) -> Pairs:
    heads, kv_width = sizes.num_heads * sizes.head_dim, sizes.num_kv_heads * sizes.head_dim
    pages = _adapters(sizes.hidden_size, (heads, kv_width, kv_width), numbers)
    device = pages.cells.device
    for tile_rows, count in ((16, 3), (64, 70)):
        borders = [0, count, count + 2, 2 * count + 2, 2 * count + 3, 2 * count + 4]
        tiles = make_tiles(borders, [0, -1, 2, 1, 3], tile_rows, device)
        x = numbers(borders[-1], sizes.hidden_size)
        ours, truth = (torch.zeros(len(x), heads + 2 * kv_width, dtype=x.dtype, device=device) for _ in range(2))
        lora.expand_rows(lora.shrink_rows(x, pages, tiles), pages, tiles, ours)
        reference_lora.expand_rows(reference_lora.shrink_rows(x, pages, tiles), pages, tiles, truth)
        yield f"LoRA in tiles of {tile_rows} rows", ours, truth
    delta, tokens = RowDelta(ours, pages, tiles), len(x)
    qkv, angles = numbers(tokens, heads + 2 * kv_width), numbers(tokens, sizes.head_dim)
    rotated, caches = [], []
    for operation in (kv_cache.rotate_and_store, reference_kv_cache.rotate_and_store):
        changed, cache = qkv.clone(), qkv.new_zeros(tokens, 2 * kv_width)
        cells = torch.arange(tokens, device=device)
        operation(changed, angles, angles, cache, cells, sizes.num_heads, sizes.head_dim, delta)
        rotated.append(changed[:, :heads].clone())
        caches.append(cache)
    yield "rotary", rotated[0], rotated[1]
    yield "KV write", caches[0], caches[1]


def _adapters(in_size: int, parts: tuple[int, ...], numbers: Numbers) -> LinearPages:
    blocks: list[Tensor] = []
    places: dict[int, dict[tuple[int, int], tuple[int, list[int]]]] = {}
    end = 0
    for slot, rank in enumerate(ADAPTER_RANKS):
        for part, size in enumerate(parts):
            a, b = numbers(rank, in_size, scale=in_size**-0.5), numbers(size, rank, scale=0.25)
            pages = a.new_zeros(-(-rank // PAGE_RANKS), PAGE_RANKS * (in_size + size))
            write_pages(pages, a, b)
            starts = [end + index * pages.shape[1] for index in range(len(pages))]
            places.setdefault(slot, {})[0, part] = (rank, starts)
            blocks.append(pages.flatten())
            end += pages.numel()
    tables = RankPages(torch.cat(blocks), [(in_size, parts)], num_slots=len(ADAPTER_RANKS), max_rank=max(ADAPTER_RANKS))
    for slot, modules in places.items():
        tables.put(slot, modules)
    return tables.linear(0)


def _attention_pairs(sizes: ModelSizes, numbers: Numbers) -> Pairs:
    heads, kv_heads, head_dim = sizes.num_heads, sizes.num_kv_heads, sizes.head_dim
    cache = numbers(60 * BLOCK_SIZE, 2 * kv_heads * head_dim)
    seq_lens = torch.tensor([1, 33, 300], dtype=torch.int32, device=cache.device)
    starts = torch.tensor([0, 1, 11, 41], dtype=torch.int32, device=cache.device)
    table = torch.arange(59, -1, -1, dtype=torch.int32, device=cache.device).view(3, 20)
    counters = torch.zeros(attention.NUM_COUNTERS, dtype=torch.int32, device=cache.device)
    for name, window, cap in (("", NO_WINDOW, None), (", a window", 50, None), (", capped scores", NO_WINDOW, 5.0)):
        shared = (BLOCK_SIZE, kv_heads, head_dim**-0.5, window, cap)
        queries = numbers(3, heads * head_dim)
        truth = reference_attention.decode_attention(queries, cache, table, seq_lens, *shared)
        ours = attention.decode_attention(queries, cache, table, seq_lens, *shared, counters)
        yield f"attention of decodes{name}", ours, truth
        queries = numbers(41, heads * head_dim)
        truth = reference_attention.chunk_attention(queries, cache, table, starts, seq_lens, *shared)
        ours = attention.chunk_attention(queries, cache, table, starts, seq_lens, 30, *shared)
        yield f"attention of prompts{name}", ours, truth
    qkv, cos, sin = numbers(3, (heads + 2 * kv_heads) * head_dim), numbers(3, head_dim), numbers(3, head_dim)
    own = table.long().gather(1, (seq_lens.long()[:, None] - 1) // BLOCK_SIZE).squeeze(1)
    cells, written = own * BLOCK_SIZE + (seq_lens - 1) % BLOCK_SIZE, cache.clone()
    sized = (heads, head_dim, BLOCK_SIZE, kv_heads, head_dim**-0.5, NO_WINDOW)
    ours = attention.turn_and_decode(qkv, cos, sin, written, cells, table, seq_lens, *sized, counters=counters)
    reference_kv_cache.rotate_and_store(qkv, cos, sin, cache, cells, heads, head_dim)
    queries = qkv[:, : heads * head_dim]
    truth = reference_attention.decode_attention(queries, cache, table, seq_lens, *sized[2:])
    yield "attention of decodes that turn", ours, truth
    yield "KV write of decodes that turn", written, cache


def _row_pairs(sizes: ModelSizes, numbers: Numbers) -> Pairs:
    gate_up = numbers(5, 4 * sizes.hidden_size)
    for name in ("silu_and_mul", "gelu_tanh_and_mul", "gelu_and_mul"):
        yield name, getattr(activation, name)(gate_up), getattr(reference_activation, name)(gate_up)
    x, residual, weight = numbers(5, sizes.hidden_size), numbers(5, sizes.hidden_size), numbers(sizes.hidden_size)
    ours = norm.add_norm(x, residual.clone(), Norm(weight, 1e-5))
    yield "add_norm", ours, reference_norm.add_norm(x, residual.clone(), Norm(weight, 1e-5))
    logits = numbers(5, sizes.vocab_size)
    (tokens, logprobs), (true_tokens, true_logprobs) = choice.most_likely(logits), reference_choice.most_likely(logits)
    yield "the likeliest token", tokens, true_tokens
    yield "its log-probability", logprobs, true_logprobs


def _packed_pairs(sizes: ModelSizes, numbers: Numbers) -> Pairs:
    width = sizes.hidden_size
    for bits in sizes.bits:
        x = numbers(300, width, scale=0.2)
        values = torch.arange(width * width).mul_(2654435761).bitwise_right_shift_(13).remainder_(1 << bits)
        scales = torch.rand(width, max(width // 128, 1), generator=torch.Generator().manual_seed(0)) / (8 << bits)
        zero = torch.full((1, 1), 1 << (bits - 1))
        packed = pack_groups(values.view(width, width).to(torch.uint8), zero, scales, None, bits, x.dtype, x.device)
        for rows in (x[:1], x[:40], x[:100], x):  # each tile, and what is written out for many rows
            truth = reference_grouped.grouped_linear(rows, packed)
            yield f"product of {len(rows)} with {bits} bits", grouped_linear.grouped_linear(rows, packed), truth


def _expert_pairs(sizes: ModelSizes, numbers: Numbers) -> Pairs:
    if not sizes.has_experts:
        return
    x, weight = numbers(5, sizes.hidden_size), numbers(NUM_EXPERTS, sizes.head_dim, sizes.hidden_size, scale=0.05)
    scores = x[:, :NUM_EXPERTS]
    ours = ExpertTiles(*moe.route_rows(scores, CHOSEN_EXPERTS, True, None, FEW_ROWS), FEW_ROWS)
    tiles = ExpertTiles(*reference_moe.route_rows(scores, CHOSEN_EXPERTS, True, None, FEW_ROWS), FEW_ROWS)
    yield "shares of experts", ours.weights, tiles.weights
    yield "rows of experts", ours.rows, tiles.rows
    truth = reference_moe.expert_linear(x, weight, tiles, True)
    yield "product with experts", moe.expert_linear(x, weight, tiles, True), truth
