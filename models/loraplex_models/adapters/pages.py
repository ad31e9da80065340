"""Rank pages: what an adapter takes in device memory, from its header alone; no torch.

A page holds eight neighbouring ranks of one linear of one layer: their rows of A, then the same rows of B transposed
(`loraplex_kernels.lora_pages` has the layout). So an adapter has ceil(rank / 8) pages for each linear that it changes,
whatever the ranks of other adapters are, and none for the others. Scaling, and the gain of DoRA, are part of B. What
else an adapter may bring is `dense`: vectors by output, token rows, full matrices, and the products of the embedding
and the head.
"""

from collections.abc import Iterable, Mapping

PAGE_ROWS = 8

# A kind of linear as `module_shapes` names it, a rank, and in how many layers the kind has that rank.
RankRows = tuple[str, int, int]


def pages_for(rank: int) -> int:
    """Pages of one linear for that rank."""
    return -(-rank // PAGE_ROWS)


def num_device_bytes(
    rank_rows: Iterable[RankRows], dense_elements: int, shapes: Mapping[str, tuple[int, int]], itemsize: int
) -> int:
    """What an adapter takes on a device; `shapes` are the input and output size of each kind of linear."""
    page_elements = {kind: PAGE_ROWS * (num_in + num_out) for kind, (num_in, num_out) in shapes.items()}
    in_pages = sum(page_elements[kind] * pages_for(rank) * num_layers for kind, rank, num_layers in rank_rows)
    return (in_pages + dense_elements) * itemsize
