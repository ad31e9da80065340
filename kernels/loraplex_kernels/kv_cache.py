"""Writing keys and values to the paged cache."""

from torch import Tensor

from loraplex_kernels.reference import kv_cache as _reference


def write_kv(cache: Tensor, slot_mapping: Tensor, keys_values: Tensor) -> None:
    """Store each token's keys and values in its cell, in place.

    cache: [cells, 2 * num_kv_heads * head_dim], keys first; slot_mapping: [T] int64; keys_values: [T, the same width],
    may be a view.
    """
    _reference.write_kv(cache, slot_mapping, keys_values)
