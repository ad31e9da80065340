"""GPTQ, as AutoGPTQ and GPTQModel store it: weight = (number - zero of its group) * scale of its group."""

import torch
from torch import Tensor

from loraplex_quant.config import QuantConfig
from loraplex_quant.grouped import GroupedWeight
from loraplex_quant.method import FLOATS, QuantFormatError, StoredLinear
from loraplex_quant.packing import WORD_BITS, packed_size, unpack

# What GPTQModel takes from each word in turn. For 3 bits these are not ones: numbers that run on from one word into the
# next have them in another order, so that until version 7 its zeros were right for itself alone.
ONES = {
    2: (0x55555555,),
    3: (0x24924924, 0x92492492, 0x49249249),
    4: (0x11111111,),
    8: (0x01010101,),
}


class GPTQ:
    """See `WeightFormat`. `qweight` packs inputs, `qzeros` outputs; `g_idx` names the group of each input."""

    def __init__(self, config: QuantConfig) -> None:
        self._bits = config.bits
        self._group_size = config.group_size
        self._layout = config.layout

    def is_quantized(self, stored: StoredLinear) -> bool:
        """Whether this linear is quantised; modules that the writer left out have a plain weight."""
        return "weight" not in stored

    def read(self, stored: StoredLinear, in_size: int, out_size: int) -> GroupedWeight:
        """Return the weight [out, in] in groups."""
        bits = self._bits
        if in_size * bits % WORD_BITS or out_size * bits % WORD_BITS:
            raise QuantFormatError(f"a linear [{out_size}, {in_size}] does not fill whole words of {bits}-bit numbers")
        group_size = in_size if self._group_size == -1 else self._group_size
        num_groups = -(-in_size // group_size)
        words = stored.take("qweight", (packed_size(in_size, bits), out_size), (torch.int32,))
        zero_words = stored.take("qzeros", (num_groups, packed_size(out_size, bits)), (torch.int32,))
        scales = stored.take("scales", (num_groups, out_size), FLOATS)
        group_of = self._group_of(stored, in_size, group_size, num_groups)
        return GroupedWeight(bits, unpack(words.T, bits), self._zeros(zero_words).T, scales.T, group_of)

    def _zeros(self, words: Tensor) -> Tensor:
        if self._layout == "v2":
            return unpack(words, self._bits)
        if self._layout == "v1-words":
            # GPTQModel takes 1 from all zeros of a word in one subtraction, so a zero of 0 borrows from the next one.
            ones = torch.tensor(ONES[self._bits]).repeat(words.shape[1] // len(ONES[self._bits]))
            return unpack((words.long() + ones).to(torch.int32), self._bits)
        # AutoGPTQ stores zero - 1, number by number: 0 is stored as the largest number.
        return (unpack(words, self._bits) + 1).bitwise_and_((1 << self._bits) - 1)

    def _group_of(self, stored: StoredLinear, in_size: int, group_size: int, num_groups: int) -> Tensor | None:
        in_order = torch.arange(in_size) // group_size
        group_of = stored.take("g_idx", (in_size,), (torch.int32,)).long() if "g_idx" in stored else in_order
        if int(group_of.min()) < 0 or int(group_of.max()) >= num_groups:
            raise QuantFormatError(f"g_idx names groups outside 0 to {num_groups - 1}")
        return None if in_size % group_size == 0 and torch.equal(group_of, in_order) else group_of
