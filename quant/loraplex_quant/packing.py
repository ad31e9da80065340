"""Small whole numbers that stand side by side in 32-bit words."""

import torch
from torch import Tensor

WORD_BITS = 32


def packed_size(count: int, bits: int) -> int:
    """Words that `count` numbers take; the last word may be partly empty."""
    per_word = WORD_BITS // bits
    return -(-count // per_word)


def unpack(words: Tensor, bits: int) -> Tensor:
    """Take apart the numbers of each row, the lowest bits of a word first.

    words: [rows, N] int32, numbers of 2, 4 or 8 bits; returns [rows, N * 32 / bits] uint8.
    """
    octets = words.contiguous().view(torch.uint8)
    if bits == 8:
        return octets
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=words.device)
    numbers = torch.bitwise_right_shift(octets.unsqueeze(-1), shifts)
    return numbers.bitwise_and_((1 << bits) - 1).flatten(1)
