"""compressed-tensors' pack-quantized form, as llm-compressor writes it: signed numbers, stored with an offset."""

import torch

from loraplex_quant.config import QuantConfig
from loraplex_quant.grouped import GroupedWeight
from loraplex_quant.method import FLOATS, QuantFormatError, StoredLinear
from loraplex_quant.packing import packed_size, unpack


class CompressedTensors:
    """See `WeightFormat`. weight = (number - zero of its group) * scale of its group; both are packed along inputs
    and outputs in turn, and both carry the same offset, so that it cancels.
    """

    def __init__(self, config: QuantConfig) -> None:
        self._bits = config.bits
        self._group_size = config.group_size
        self._is_symmetric = config.is_symmetric

    def is_quantized(self, stored: StoredLinear) -> bool:
        """Whether this linear is quantised; ignored modules have a plain weight."""
        return "weight" not in stored

    def read(self, stored: StoredLinear, in_size: int, out_size: int) -> GroupedWeight:
        """Return the weight [out, in] in groups."""
        bits = self._bits
        group_size = in_size if self._group_size == -1 else self._group_size
        if in_size % group_size:
            raise QuantFormatError(f"group_size {group_size} does not divide the {in_size} inputs")
        num_groups = in_size // group_size
        shape = stored.take("weight_shape", (2,), (torch.int64, torch.int32)).tolist()
        if shape != [out_size, in_size]:
            raise QuantFormatError(f"weight_shape says {shape}, config.json asks for {[out_size, in_size]}")
        words = stored.take("weight_packed", (out_size, packed_size(in_size, bits)), (torch.int32,))
        scales = stored.take("weight_scale", (out_size, num_groups), FLOATS)
        zeros = torch.full((1, 1), 1 << (bits - 1))
        if not self._is_symmetric:
            zero_words = stored.take("weight_zero_point", (packed_size(out_size, bits), num_groups), (torch.int32,))
            zeros = unpack(zero_words.T, bits)[:, :out_size].T
        group_of = None
        if "weight_g_idx" in stored:
            group_of = stored.take("weight_g_idx", (in_size,), (torch.int32, torch.int64)).long()
            if int(group_of.min()) < 0 or int(group_of.max()) >= num_groups:
                raise QuantFormatError(f"weight_g_idx names groups outside 0 to {num_groups - 1}")
        return GroupedWeight(bits, unpack(words, bits)[:, :in_size], zeros, scales, group_of)
