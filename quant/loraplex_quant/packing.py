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


def scale_groups(numbers: Tensor, zeros: Tensor, scales: Tensor, group_of: Tensor | None) -> Tensor:
    """Return (numbers - zeros) * scales in float32, with one zero and one scale for each group of columns.

    numbers: [out, in]; zeros: [out, G] or [1, 1]; scales: [out, G]; `group_of`: the group of each column, [in], or
    None where groups are runs of equal length.
    """
    out_size, num_groups = scales.shape
    weight = numbers.to(torch.float32, memory_format=torch.contiguous_format)
    if group_of is not None:
        zeros = zeros.float().expand(out_size, num_groups)[:, group_of]
        return weight.sub_(zeros).mul_(scales.float()[:, group_of])
    grouped = weight.view(out_size, num_groups, -1)
    grouped.sub_(zeros.float().unsqueeze(-1)).mul_(scales.float().unsqueeze(-1))
    return weight
