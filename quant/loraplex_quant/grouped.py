"""Weights as small whole numbers with a zero and a scale for each group: what GPTQ, AWQ and others have in common."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Runs = Sequence[tuple[int, int]]  # start and stop of each


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

    def part(self, output_runs: Runs | None, input_runs: Runs | None) -> "GroupedWeight":
        """Return the weight of some outputs and inputs, None for all of them.

        Inputs that are whole groups stay runs of groups; other ones keep all groups, and each names its own.
        """
        numbers, zeros, scales, group_of = self.numbers, self.zeros, self.scales, self.group_of
        if output_runs is not None:
            numbers, scales = take_runs(numbers, 0, output_runs), take_runs(scales, 0, output_runs)
            zeros = zeros if len(zeros) == 1 else take_runs(zeros, 0, output_runs)
        if input_runs is not None:
            numbers = take_runs(numbers, 1, input_runs)
            if group_of is None and all(place % self.group_size == 0 for run in input_runs for place in run):
                group_runs = [(start // self.group_size, stop // self.group_size) for start, stop in input_runs]
                scales = take_runs(scales, 1, group_runs)
                zeros = zeros if zeros.shape[1] == 1 else take_runs(zeros, 1, group_runs)
            else:
                if group_of is None:
                    group_of = torch.arange(self.numbers.shape[1]) // self.group_size
                group_of = take_runs(group_of, 0, input_runs)
        return GroupedWeight(self.bits, numbers, zeros, scales, group_of)

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


def take_runs(tensor: Tensor, dim: int, runs: Runs) -> Tensor:
    """Return some runs of a dimension side by side; a single one is a view."""
    parts = [tensor.narrow(dim, start, stop - start) for start, stop in runs]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def plain(weight: Tensor | GroupedWeight) -> Tensor:
    """Return a weight as plain numbers: itself, or in float32 what it stands for."""
    return weight.dequantize() if isinstance(weight, GroupedWeight) else weight
