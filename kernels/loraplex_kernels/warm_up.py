"""Compile what is compiled on first use, so that no request waits for it."""

from pathlib import Path

import torch

from loraplex_kernels.activation import gelu_tanh_and_mul, silu_and_mul
from loraplex_kernels.attention import decode_attention
from loraplex_kernels.choice import most_likely
from loraplex_kernels.cpu.compiled import kept_code_folder
from loraplex_kernels.dispatch import has_gpu_forms
from loraplex_kernels.kv_cache import rotate_and_store
from loraplex_kernels.linear import linear, pack_weight
from loraplex_kernels.lora import LoraSegments, LoraTable, lora_expand, lora_shrink
from loraplex_kernels.moe import route_tokens, sum_experts
from loraplex_kernels.norm import rms_norm, rms_norm_groups


def compiling_notice(device: torch.device) -> str | None:
    """Why warming up takes long this time, for who waits for it; None where it does not."""
    if has_gpu_forms(device):
        return None
    folder: Path | None = kept_code_folder()  # type: ignore[no-untyped-call]
    if folder is None:
        return "compiling kernels for a minute or more, as at every start: no folder to keep them in (XDG_CACHE_HOME)"
    if any(folder.rglob("*.nbi")):
        return None
    return f"compiling kernels for a minute or more, once: they are kept in {folder}"


def warm_up(dtype: torch.dtype, device: torch.device, *, has_experts: bool) -> None:
    """Call each operation that is compiled on first use, on a few numbers; kept on disk, it takes seconds only once.

    On a GPU nothing is done: kernels are compiled for the sizes that they meet, when graphs are captured.
    """
    if has_gpu_forms(device):
        return
    x = torch.ones(1, 8, dtype=dtype, device=device)
    rms_norm(x, x[0], 1e-5)
    rms_norm_groups(x.clone(), x[0], 4, 1e-5)
    silu_and_mul(x)
    gelu_tanh_and_mul(x)
    most_likely(x)
    wide = torch.ones(64, 64, dtype=dtype, device=device)
    linear(wide[:1], pack_weight(wide))
    cells = torch.zeros(1, dtype=torch.int64, device=device)
    rotate_and_store(x.clone(), x[:, :2], x[:, :2], x[:, :4].clone(), cells, num_heads=2, head_dim=2)
    first, length = torch.zeros(1, 1, dtype=torch.int32, device=device), torch.ones(1, dtype=torch.int32, device=device)
    decode_attention(x[:, :4], x, first, length, block_size=1, num_kv_heads=1, scale=1.0, window=1)
    if has_experts:
        sum_experts(x, route_tokens(x, 1, True))
    table = LoraTable(1, (8,), dtype, device)
    table.set(0, 0, x, x.view(8, 1))
    segments = LoraSegments((0, 1), (0,))
    lora_expand(lora_shrink(x, table, segments), table, segments, x)
