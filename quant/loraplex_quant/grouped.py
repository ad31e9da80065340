"""Weights as small whole numbers with a zero and a scale for each group: what GPTQ, AWQ and others have in common."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class GroupedWeight:
    """weight[o, i] = (numbers[o, i] - zeros[o, g]) * scales[o, g], where g is the group of input i.

    numbers: [out, in] uint8, below 2 ** bits; zeros: [out, G], or [1, 1] where one holds for all; scales: [out, G];
    `group_of`: the group of each input, [in] int64, or None where groups are runs of in / G inputs.
    """

    bits: int
    numbers: Tensor
    zeros: Tensor
    scales: Tensor
    group_of: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Outputs and inputs."""
        return self.numbers.shape[0], self.numbers.shape[1]

    @property
    def group_size(self) -> int:
        """Inputs of a group; to be asked only where groups are runs."""
        return self.numbers.shape[1] // self.scales.shape[1]

    def dequantize(self) -> Tensor:
        """Return the weight [out, in] in float32, in memory of its own."""
        out_size, num_groups = self.scales.shape
        scales = self.scales.float()
        weight = self.numbers.to(torch.float32, memory_format=torch.contiguous_format)
        if self.group_of is not None:
            zeros = self.zeros.float().expand(out_size, num_groups)[:, self.group_of]
            return weight.sub_(zeros).mul_(scales[:, self.group_of])
        grouped = weight.view(out_size, num_groups, -1)
        grouped.sub_(self.zeros.float().unsqueeze(-1)).mul_(scales.unsqueeze(-1))
        return weight


def plain(weight: Tensor | GroupedWeight) -> Tensor:
    """Return a weight as plain numbers: itself, or in float32 what it stands for."""
    return weight.dequantize() if isinstance(weight, GroupedWeight) else weight
