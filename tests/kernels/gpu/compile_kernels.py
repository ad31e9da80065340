"""Compile every kernel for a GPU that is not here: `compile_kernels.py 90` for an H100. Prints what became of each.

A line has the threads' warps, registers, bytes spilled and shared, the product of tensor cores, how many loads of which
width the code has, and the seconds of a processor. A line that begins with FAULT says what is slow or does not fit.
A stand-in takes the driver's place; operations are called with tensors of the CPU, and launching stops after compiling.
"""

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import triton
from compiled_code import MAX_SHARED_BYTES, faults, read_code
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from loraplex_kernels.gpu import (
    activation,
    attention,
    choice,
    cuts,
    draw,
    grouped_linear,
    kv_cache,
    lora,
    moe,
    norm,
    top_tokens,
)
from loraplex_kernels.gpu import scores as sampler_scores
from loraplex_kernels.grouped_linear import pack_groups, stack_groups
from loraplex_kernels.kv_cache import HeadNorms
from loraplex_kernels.lora_pages import RankPages, RowDelta, make_tiles
from loraplex_kernels.moe_tiles import ExpertTiles
from loraplex_kernels.norm import Norm
from loraplex_kernels.row_state import Chosen, RowState, Tops
from loraplex_kernels.sampling_inputs import Bans, Biases, Cuts, Draws, Masks, Penalties

CPU = torch.device("cpu")
BENCH = Path(__file__).parents[3] / "bench"


class AbsentGpu:
    """What Triton asks of a driver before it compiles."""

    def __init__(self, capability: int) -> None:
        self._capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self._capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_instead(kernel: JITFunction, grid: object) -> Any:
    def run(*arguments: Any, **settings: Any) -> None:
        began = _seconds()
        compiled = kernel.warmup(*arguments, grid=grid, **settings)
        code = read_code(kernel.__name__, compiled)
        print(f"{code} {_seconds() - began:5.1f} s")
        if wrong := faults(code, int(sys.argv[1]), settings.get("ROWS", 0)):
            print(f"FAULT {kernel.__name__} {'; '.join(wrong)}; compiled for {settings}")

    return run


def _seconds() -> float:
    """Of a processor, for us and the assembler."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def call_all(dtype: torch.dtype) -> None:
    """Every operation as an 8B model calls it."""

    def numbers(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype)

    qkv_parts, inner = (4096, 1024, 1024), 14336
    tables = RankPages(numbers(64), [(4096, qkv_parts), (4096, (inner, inner))], num_slots=8, max_rank=64)
    pages, x, qkv = tables.linear(0), numbers(8, 4096), numbers(8, 6144)
    for tile_rows in (16, 64):
        tiles = make_tiles([0, 4, 8], [0, 1], tile_rows, CPU)
        lora.expand_rows(lora.shrink_rows(x, pages, tiles), pages, tiles, qkv)
    delta = RowDelta(qkv, pages, tiles)
    lora.add_rows(qkv, delta)
    cache, angles, cells = numbers(64, 2048), numbers(8, 128), torch.arange(8)
    norms = HeadNorms(numbers(4096), numbers(1024), 1e-5)
    kv_cache.rotate_and_store(qkv, angles, angles, cache, cells, 32, 128, delta, norms)
    kv_cache.rotate_and_store(qkv, angles, angles, cache, cells, 32, 128)
    together = replace(norms, squares=norm.head_squares(qkv, (4096, 1024), delta), widths=(4096, 1024))
    kv_cache.rotate_and_store(qkv, angles, angles, cache, cells, 32, 128, delta, together, are_neighbours=True)
    table, lengths = torch.zeros(8, 16, dtype=torch.int32), torch.zeros(9, dtype=torch.int32)
    for window, cap in ((1 << 30, None), (100, 50.0)):
        attention.decode_attention(qkv[:, :4096], cache, table, lengths[:8], 16, 8, 0.1, window, cap)
        attention.chunk_attention(qkv[:, :4096], cache, table, lengths, lengths[:8], 64, 16, 8, 0.1, window, cap)
        for how in ((None, None), (delta, norms)):
            attention.turn_and_decode(
                qkv, angles, angles, cache, cells, table, lengths[:8], 32, 128, 16, 8, 0.1, window, cap, *how
            )
    wide = numbers(64, 4 * 256)  # two heads of 256, as Gemma has
    attention.chunk_attention(qkv[:, :512], wide, table, lengths, lengths[:8], 64, 16, 2, 0.1, 1 << 30)
    activation.silu_and_mul(numbers(8, 2 * inner), RowDelta(numbers(8, 2 * inner), tables.linear(1), tiles))
    activation.gelu_tanh_and_mul(numbers(8, 2 * inner))
    activation.gelu_and_mul(numbers(8, 2 * inner))
    activation.gelu(numbers(8, inner))
    norm.rms_norm(x, x[0], 1e-5)
    norm.rms_norm_groups(qkv[:, :4096], x[0], 128, 1e-5)
    scaled, centred = Norm(x[0], 1e-5), Norm(x[0], 1e-5, x[0], is_centred=True)
    norm.add_norm(x, x, scaled, RowDelta(x, pages, tiles), scaled)
    norm.add_norm(x, x, centred, share=0.5)
    norm.add_norm(x, x, None)
    choice.most_likely(numbers(8, 128256))
    sample(numbers(8, 128256))
    for bits, rows in ((2, (1,)), (8, (1,)), (4, (1, 32, 128, 300))):
        weight = torch.zeros(256, 4096, dtype=torch.uint8)
        packed = pack_groups(weight, torch.full((1, 1), 2), torch.ones(256, 32), None, bits, dtype, CPU)
        for num_rows in rows:
            grouped_linear.grouped_linear(numbers(num_rows, 4096), packed)
    experts = stack_groups([packed, packed])
    assert experts is not None
    weight = numbers(128, 1536, 2048)
    for num_tokens, tile_rows in ((8, 16), (64, 64)):
        slots = torch.zeros(num_tokens, dtype=torch.int32)
        routed = ExpertTiles(*moe.route_rows(numbers(num_tokens, 128), 8, True, slots, tile_rows), tile_rows)
        moe.cut_rows(slots, tile_rows, num_tokens)
        moe.expert_linear(numbers(num_tokens, 2048), weight, routed, True)
        grouped_linear.grouped_expert_linear(numbers(num_tokens, 4096), experts, routed, True)
    moe.sum_rows(numbers(512, 4096), routed, delta)


def call_forms(dtype: torch.dtype) -> None:
    """What bench/gpu.py measures beside the engine's form of a prompt's linear."""
    sys.path.append(str(BENCH))
    import gpu_fused  # bench/ is no package

    pages = RankPages(torch.empty(64, dtype=dtype), [(4096, (4096, 1024, 1024))], num_slots=8, max_rank=16).linear(0)
    x, weight, out = (torch.empty(shape, dtype=dtype) for shape in ((200, 4096), (6144, 4096), (200, 6144)))
    h = torch.empty(4, 200, 3, 16)
    gpu_fused.product_and_delta(x, weight, h, pages, make_tiles([0, 200], [0], 128, CPU))
    gpu_fused.activate_and_add(out, h, pages, make_tiles([0, 200], [0], 64, CPU))


def sample(logits: torch.Tensor) -> None:
    """What the sampler calls for rows that ask for everything."""
    num_rows, vocab_size = logits.shape
    column = torch.ones(num_rows, dtype=torch.int32)
    floats, longs, wide = column.float(), column.long(), torch.ones(num_rows, 8, dtype=torch.int32)
    counts = torch.empty(num_rows, 2, vocab_size, dtype=torch.int32)
    state = RowState(longs, column, column, counts, wide)
    chosen, scores = Chosen(longs, floats), torch.empty(num_rows, vocab_size)
    masks = Masks(torch.empty(num_rows, vocab_size // 32, dtype=torch.int32), column)
    draws = Draws(column, column, floats, longs)
    choice.choose_rows(logits, column, column, state, chosen)
    sampler_scores.copy_scores(logits, column, None, scores)
    sampler_scores.copy_scores(logits, column, masks, scores)
    sampler_scores.add_biases(scores, Biases(column, column, floats))
    sampler_scores.ban_tokens(scores, Bans(*[column] * 7, longest=3), state)
    sampler_scores.add_to_lists(scores, masks, 2.0)
    sampler_scores.penalise(scores, Penalties(column, column, *[floats] * 4), state)
    draw.temper(scores, draws, chosen, floats)
    cuts.cut_scores(scores, Cuts(column, column, floats, floats, floats), longs)
    draw.draw(scores, draws, state, chosen, floats)
    for some in (scores, logits):
        top_tokens.top_tokens(some, column, column, floats, Tops(column, wide, wide.float()))
    top_tokens.given_tokens(logits, longs, floats, floats)


if __name__ == "__main__":
    triton.runtime.driver.set_active(AbsentGpu(int(sys.argv[1])))
    attention._shared_bytes = lambda device: MAX_SHARED_BYTES[int(sys.argv[1])]  # what its tiles are chosen by
    JITFunction.__getitem__ = compile_instead
    call_all(torch.bfloat16)
    call_forms(torch.bfloat16)
