"""Writing keys and values to the paged cache in plain torch."""

from torch import Tensor


def write_kv(cache: Tensor, slot_mapping: Tensor, keys_values: Tensor) -> None:
    cache.index_copy_(0, slot_mapping, keys_values)
