"""Small whole numbers that stand side by side in 32-bit words."""

import torch
from torch import Tensor

WORD_BITS = 32


def packed_size(count: int, bits: int) -> int:
    """Words that `count` numbers take; the last word may be partly empty."""
    return -(-count * bits // WORD_BITS)


def unpack(words: Tensor, bits: int) -> Tensor:
    """Take apart the numbers of each row, the lowest bits of a word first.

    words: [rows, N] int32, numbers of 2, 3, 4 or 8 bits; returns [rows, N * 32 / bits] uint8. Numbers of 3 bits run on
    from one word into the next, so that 32 of them take three words; N is a multiple of three then.
    """
    octets = words.contiguous().view(torch.uint8)
    if bits == 8:
        return octets
    if bits == 3:
        return _unpack_threes(octets)
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=words.device)
    numbers = torch.bitwise_right_shift(octets.unsqueeze(-1), shifts)
    return numbers.bitwise_and_((1 << bits) - 1).flatten(1)


def _unpack_threes(octets: Tensor) -> Tensor:
    """Eight numbers of 3 bits from every three octets."""
    first, second, third = octets.view(len(octets), -1, 3).to(torch.int32).unbind(-1)
    runs = first | second << 8 | third << 16
    shifts = torch.arange(0, 24, 3, dtype=torch.int32, device=octets.device)
    return torch.bitwise_right_shift(runs.unsqueeze(-1), shifts).bitwise_and_(7).to(torch.uint8).flatten(1)
