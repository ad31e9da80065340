"""The tensor-parallel group: the ranks that share one model. Only this file may know torch.distributed."""

from torch import Tensor


class ParallelGroup:
    """The ranks that each hold a part of every layer. Today a group has one rank, and collectives return their input.

    Layers call the collectives where several ranks would need them, so that more ranks change this file only.
    """

    def __init__(self, rank: int, size: int) -> None:
        """Describe this process's place in the group. Raises ValueError for more than one rank."""
        if size != 1 or rank != 0:
            raise ValueError(f"rank {rank} of {size}: this version runs a model on one rank only")
        self.rank = rank
        self.size = size

    @classmethod
    def single(cls) -> "ParallelGroup":
        """Return the group of one rank."""
        return cls(0, 1)

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Return the sum of the ranks' tensors."""
        return tensor

    def all_gather(self, tensor: Tensor) -> Tensor:
        """Return the ranks' tensors side by side along the last dimension, in the order of ranks."""
        return tensor
