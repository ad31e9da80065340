"""Heads of one token as attention reads them, in registers: delta added, normalised, turned by the token's angles."""

import triton
import triton.language as tl

from loraplex_kernels.gpu.delta import rank_of


@triton.jit
def turned_heads(
    row, head, delta, rank, cos, signed_sin, weight, eps,
    HEAD_DIM: tl.constexpr, DIMS: tl.constexpr, TURNED: tl.constexpr,
    HAS_DELTA: tl.constexpr, HAS_NORMS: tl.constexpr, ARE_NEIGHBOURS: tl.constexpr,
):  # fmt: skip
    """Return heads [R] of the token whose row starts at `row`, [R, DIMS] in float32, as `rotate_and_store` makes them.

    `delta`: the token's row of it, added where `rank` is not 0; `cos`, `signed_sin`: the token's; `weight`: where the
    norm of head 0 would stand. What an element is turned with is read a second time, so that no thread asks another.
    """
    d = tl.arange(0, DIMS)
    is_dim = (d < HEAD_DIM)[None, :]
    is_turned = d < TURNED
    if ARE_NEIGHBOURS:
        other, angle = d ^ 1, d // 2 + d % 2 * (TURNED // 2)
    else:
        other, angle = tl.where(d < TURNED // 2, d + TURNED // 2, d - TURNED // 2), d
    place = head[:, None] * HEAD_DIM + d[None, :]
    partner = head[:, None] * HEAD_DIM + tl.where(is_turned, other, d)[None, :]
    x = tl.load(row + place, mask=is_dim, other=0.0).to(tl.float32)
    y = tl.load(row + partner, mask=is_dim, other=0.0).to(tl.float32)
    if HAS_DELTA:
        if rank > 0:
            x += tl.load(delta + place, mask=is_dim, other=0.0).to(tl.float32)
            y += tl.load(delta + partner, mask=is_dim, other=0.0).to(tl.float32)
    if HAS_NORMS:
        scale = 1.0 / tl.sqrt(tl.sum(x * x, 1) / HEAD_DIM + eps)
        x *= scale[:, None] * tl.load(weight + place, mask=is_dim, other=0.0).to(tl.float32)
        y *= scale[:, None] * tl.load(weight + partner, mask=is_dim, other=0.0).to(tl.float32)
    cosine = tl.load(cos + angle, mask=is_turned, other=1.0).to(tl.float32)
    sine = tl.load(signed_sin + angle, mask=is_turned, other=0.0).to(tl.float32)
    return x * cosine[None, :] + y * sine[None, :]


@triton.jit
def rank_of_part(row_slots, ranks, rank_stride, token, part, HAS_DELTA: tl.constexpr, PARTS: tl.constexpr):
    """The rank of the token's adapter in queries, keys or values (0, 1, 2), or in all where they are one part."""
    rank = 0
    if HAS_DELTA:
        rank = rank_of(row_slots, ranks, rank_stride, token, part if PARTS == 3 else 0)
    return rank
