"""Rotary position embedding, and writing keys and values to the paged cache: one pass over both."""

from dataclasses import dataclass

from torch import Tensor

from loraplex_kernels.cpu import kv_cache as _cpu
from loraplex_kernels.dispatch import on_gpu
from loraplex_kernels.lora_pages import RowDelta
from loraplex_kernels.reference import kv_cache as _reference


@dataclass(frozen=True, slots=True)
class HeadNorms:
    """RMSNorms of queries and keys before they are turned: of each head alone, or, with `squares`, of all together."""

    query_weight: Tensor  # [num_heads * head_dim]
    key_weight: Tensor  # [num_kv_heads * head_dim]
    eps: float
    squares: Tensor | None = None  # [T, 2] float32: sums of squares of a token's queries and of its keys
    widths: tuple[int, int] = (0, 0)  # how many numbers each of these sums is of


def rotate_and_store(
    qkv: Tensor, cos: Tensor, signed_sin: Tensor, cache: Tensor, slot_mapping: Tensor, num_heads: int, head_dim: int,
    delta: RowDelta | None = None, norms: HeadNorms | None = None, *, are_neighbours: bool = False,
) -> None:  # fmt: skip
    """Turn each query and key head by its token's angles, in place, then store keys and values in the token's cell.

    qkv: [T, (num_heads + 2 * num_kv_heads) * head_dim], dense, queries first, then keys, then values; cos, signed_sin:
    [T, turned], each half the same angles, where `turned` is head_dim or less, and the rest of a head stays as it is.
    Element i is paired with element i + turned / 2; `signed_sin` is negative in its first half, so that
    head = head * cos + swap_halves(head) * signed_sin. cache: [cells, 2 * num_kv_heads * head_dim], keys first, written
    in place; slot_mapping: [T] int64, the cell of each token. All floating tensors have the dtype of `qkv`. With
    `delta`, of three parts or one, it is added to `qkv` first; then come the norms where there are any. With
    `are_neighbours` elements 2 i and 2 i + 1 are a pair instead, turned by the angles i and i + turned / 2.
    """
    if on_gpu(qkv):
        from loraplex_kernels.gpu import kv_cache as _gpu  # Triton exists on GPU machines only

        _gpu.rotate_and_store(
            qkv, cos, signed_sin, cache, slot_mapping, num_heads, head_dim, delta, norms, are_neighbours=are_neighbours
        )
    elif delta is None and norms is None and not are_neighbours:
        _cpu.rotate_and_store(qkv, cos, signed_sin, cache, slot_mapping, num_heads, head_dim)
    else:
        _reference.rotate_and_store(
            qkv, cos, signed_sin, cache, slot_mapping, num_heads, head_dim, delta, norms, are_neighbours=are_neighbours
        )
