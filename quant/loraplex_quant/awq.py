"""AWQ, as AutoAWQ stores it for its two kernels: weight = (number - zero of its group) * scale of its group."""

import torch
from torch import Tensor

from loraplex_quant.config import QuantConfig
from loraplex_quant.grouped import GroupedWeight
from loraplex_quant.method import FLOATS, QuantFormatError, StoredLinear
from loraplex_quant.packing import WORD_BITS, packed_size, unpack

BITS = 4
PER_WORD = WORD_BITS // BITS
# Where the gemm layout keeps the eight neighbouring outputs of a word.
GEMM_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)


class AWQ:
    """See `WeightFormat`. gemm packs outputs, in an order of its own; gemv packs inputs and pads zeros and scales."""

    def __init__(self, config: QuantConfig) -> None:
        self._group_size = config.group_size
        self._layout = config.layout

    def is_quantized(self, stored: StoredLinear) -> bool:
        """Whether this linear is quantised; modules_to_not_convert have a plain weight."""
        return "weight" not in stored

    def read(self, stored: StoredLinear, in_size: int, out_size: int) -> GroupedWeight:
        """Return the weight [out, in] in groups."""
        group_size = in_size if self._group_size == -1 else self._group_size
        if in_size % group_size:
            raise QuantFormatError(f"group_size {group_size} does not divide the {in_size} inputs")
        packed = in_size if self._layout == "gemv" else out_size
        if packed % PER_WORD:
            raise QuantFormatError(f"a linear [{out_size}, {in_size}] does not fill whole words of 4-bit numbers")
        read = _read_gemv if self._layout == "gemv" else _read_gemm
        numbers, zeros, scales = read(stored, in_size, out_size, group_size)
        return GroupedWeight(BITS, numbers, zeros, scales)


def _read_gemm(stored: StoredLinear, in_size: int, out_size: int, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    num_groups, num_words = in_size // group_size, packed_size(out_size, BITS)
    words = stored.take("qweight", (in_size, num_words), (torch.int32,))
    zero_words = stored.take("qzeros", (num_groups, num_words), (torch.int32,))
    scales = stored.take("scales", (num_groups, out_size), FLOATS)
    return _gemm_order(unpack(words, BITS)).T, _gemm_order(unpack(zero_words, BITS)).T, scales.T


def _gemm_order(numbers: Tensor) -> Tensor:
    return numbers.view(len(numbers), -1, PER_WORD)[:, :, list(GEMM_ORDER)].flatten(1)


def _read_gemv(stored: StoredLinear, in_size: int, out_size: int, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    num_groups = in_size // group_size
    # AutoAWQ's gemv kernel reads zeros in runs of as many words as make 128 inputs of small groups.
    run = {64: 2, 32: 4}.get(group_size, 1)
    zero_width = -(-packed_size(num_groups, BITS) // run) * run
    words = stored.take("qweight", (out_size, packed_size(in_size, BITS)), (torch.int32,))
    zero_words = stored.take("qzeros", (out_size, zero_width), (torch.int32,))
    scales = stored.take("scales", (out_size, zero_width * PER_WORD), FLOATS)
    return unpack(words, BITS), unpack(zero_words, BITS)[:, :num_groups], scales[:, :num_groups]
