"""The LoRA delta on the CPU: a compiled loop for the short segments of decoding, torch's products for long ones.

The loop reads each adapter's own rows where they lie, through a table of addresses: nothing is stacked or padded when
the adapters of a batch change. A row of weights is read once for all tokens of a segment.
"""

import numpy as np

from loraplex_kernels.cpu.compiled import floats, halves, ints, jit, load, longs, numbers_like, store

# Tokens of one adapter from which on two products of torch are faster than the loop.
MIN_LONG_SEGMENT = 32


@jit
def _shrink_segments(x, table, starts, slots, max_rank, h):
    size, num_parts = x.shape[1], table.shape[1]
    for segment in range(len(slots)):
        start, end, slot = starts[segment], starts[segment + 1], slots[segment]
        if slot < 0 or end - start >= MIN_LONG_SEGMENT:
            continue
        for part in range(num_parts):
            rank = table[slot, part, 2]
            a = numbers_like(x, table[slot, part, 0], (rank, size))
            for row in range(rank):
                for token in range(start, end):
                    total = np.float32(0)
                    for i in range(size):
                        total += load(x[token, i]) * load(a[row, i])
                    h[token, part * max_rank + row] = total


@jit
def _expand_segments(h, table, starts, slots, max_rank, columns, out):
    num_parts = table.shape[1]
    total = np.empty(out.shape[1], np.float32)
    for segment in range(len(slots)):
        start, end, slot = starts[segment], starts[segment + 1], slots[segment]
        if slot < 0 or end - start >= MIN_LONG_SEGMENT:
            continue
        for part in range(num_parts):
            rank = table[slot, part, 2]
            if rank == 0:
                continue
            first, size = columns[part], columns[part + 1] - columns[part]
            b = numbers_like(out, table[slot, part, 1], (rank, size))
            for token in range(start, end):
                for i in range(size):
                    total[i] = load(out[token, first + i])
                column = part * max_rank
                # Four rows at a time: the running total is read and written a quarter as often.
                for row in range(0, rank - 3, 4):
                    w0, w1 = h[token, column + row], h[token, column + row + 1]
                    w2, w3 = h[token, column + row + 2], h[token, column + row + 3]
                    for i in range(size):
                        total[i] += (w0 * load(b[row, i]) + w1 * load(b[row + 1, i])) + (
                            w2 * load(b[row + 2, i]) + w3 * load(b[row + 3, i])
                        )
                for row in range(rank - rank % 4, rank):
                    weight = h[token, column + row]
                    for i in range(size):
                        total[i] += weight * load(b[row, i])
                for i in range(size):
                    out[token, first + i] = store(total[i], out[token, first])


@jit
def shrink_short(is_half, x, num_tokens, size, table, num_slots, num_parts, starts, slots, num_segments, max_rank, h):
    """Fill the rows of h that belong to short segments; the others stay as they are. Tensors come as addresses."""
    addresses = longs(table, (num_slots, num_parts, 3))
    borders, owners = ints(starts, num_segments + 1), ints(slots, num_segments)
    ranks = floats(h, (num_tokens, num_parts * max_rank))
    if is_half:
        _shrink_segments(halves(x, (num_tokens, size)), addresses, borders, owners, max_rank, ranks)
    else:
        _shrink_segments(floats(x, (num_tokens, size)), addresses, borders, owners, max_rank, ranks)


@jit
def expand_short(
    is_half, h, num_tokens, size, table, num_slots, num_parts, starts, slots, num_segments, max_rank, columns, out
):
    """Add the deltas of the short segments to out, in place. Tensors come as addresses."""
    addresses = longs(table, (num_slots, num_parts, 3))
    borders, owners = ints(starts, num_segments + 1), ints(slots, num_segments)
    ranks = floats(h, (num_tokens, num_parts * max_rank))
    edges = longs(columns, num_parts + 1)
    if is_half:
        _expand_segments(ranks, addresses, borders, owners, max_rank, edges, halves(out, (num_tokens, size)))
    else:
        _expand_segments(ranks, addresses, borders, owners, max_rank, edges, floats(out, (num_tokens, size)))
