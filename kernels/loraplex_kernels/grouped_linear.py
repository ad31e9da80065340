"""A linear layer over small whole numbers in groups (GPTQ, AWQ and alike), dequantised while it is computed."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from loraplex_kernels.dispatch import on_gpu
from loraplex_kernels.reference import grouped_linear as _reference

# A word holds every SLICE-th input of a block, so that one shift gives SLICE neighbouring inputs of many words at once:
# what one product of tensor cores takes.
SLICE = 16
WORD_BITS = 32


@dataclass(frozen=True, slots=True)
class PackedGroups:
    """A weight [out, in] as `pack_groups` lays it out: weight = (number - zero of its group) * scale of its group.

    Inputs stand in the order of their groups; a block is SLICE * (32 / bits) of them, the last one filled up with
    zeros. Word s of a block holds its inputs s, s + SLICE, s + 2 * SLICE …, the first in the lowest bits.

    What `stack_groups` gives has one more dimension before all others: the expert.
    """

    words: Tensor  # [blocks * SLICE, out] int32
    scales: Tensor  # [groups, out] in the layer's dtype
    zeros: Tensor  # [groups, out] in the layer's dtype; no whole numbers where weights were quantised on the way
    order: Tensor | None  # [in] int32: which input stands at each place; None where they stand as they are
    group_of: Tensor | None  # [blocks * block size] int32: the group at each place; None where groups are even runs
    group_size: int  # of even runs
    bits: int
    in_size: int

    @property
    def num_bytes(self) -> int:
        """Size of all tensors."""
        tensors = (self.words, self.scales, self.zeros, self.order, self.group_of)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)

    def of_expert(self, expert: int) -> "PackedGroups":
        """One of the weights that were stacked."""
        order, group_of = (None if tensor is None else tensor[expert] for tensor in (self.order, self.group_of))
        return replace(
            self,
            words=self.words[expert],
            scales=self.scales[expert],
            zeros=self.zeros[expert],
            order=order,
            group_of=group_of,
        )


def pack_groups(
    numbers: Tensor, zeros: Tensor, scales: Tensor, group_of: Tensor | None, bits: int,
    dtype: torch.dtype, device: torch.device,
) -> PackedGroups:  # fmt: skip
    """Lay a quantised weight out for `grouped_linear`.

    numbers: [out, in], below 2 ** bits, bits 2, 4 or 8; zeros: [out, groups] or [1, 1]; scales: [out, groups];
    group_of: [in] int64, the group of each input, or None where groups are runs of in / groups inputs.
    """
    assert bits in (2, 4, 8), f"{bits} bits have no layout"
    numbers = numbers.to(device)  # on a GPU the work below is done there
    group_of = None if group_of is None else group_of.to(device)
    out_size, in_size = numbers.shape
    num_groups = scales.shape[1]
    per_word = WORD_BITS // bits
    order = None
    if group_of is None:
        group_of = torch.arange(in_size, device=device) // (in_size // num_groups)
    elif not bool((group_of.diff() >= 0).all()):
        order = group_of.argsort(stable=True)
        numbers, group_of = numbers[:, order], group_of[order]
    group_size = -(-in_size // num_groups)
    is_even = group_size % SLICE == 0 and torch.equal(group_of, torch.arange(in_size, device=device) // group_size)
    block = SLICE * per_word
    num_blocks = -(-in_size // block)
    padded = torch.nn.functional.pad(numbers.to(torch.uint8), (0, num_blocks * block - in_size))
    fields = padded.view(out_size, num_blocks, per_word, SLICE).long()
    shifts = torch.arange(per_word, device=device).view(1, 1, per_word, 1) * bits
    words = (fields << shifts).sum(2).to(torch.int32).view(out_size, -1)
    padded_groups = torch.nn.functional.pad(group_of, (0, num_blocks * block - in_size), value=num_groups - 1)
    return PackedGroups(
        words=words.t().contiguous(),
        scales=scales.t().to(device, dtype).contiguous(),
        zeros=zeros.expand(out_size, num_groups).t().to(device, dtype).contiguous(),
        order=None if order is None else order.to(torch.int32),
        group_of=None if is_even else padded_groups.to(torch.int32),
        group_size=group_size,
        bits=bits,
        in_size=in_size,
    )


def stack_groups(weights: Sequence[PackedGroups]) -> PackedGroups | None:
    """Put the weights of experts together; None where they are not of one shape and kind."""
    first = weights[0]
    kinds = {
        (w.words.shape, w.scales.shape, w.group_size, w.bits, w.order is None, w.group_of is None) for w in weights
    }
    if len(kinds) > 1:
        return None
    orders = [w.order for w in weights if w.order is not None]
    groups = [w.group_of for w in weights if w.group_of is not None]
    return replace(
        first,
        words=torch.stack([w.words for w in weights]),
        scales=torch.stack([w.scales for w in weights]),
        zeros=torch.stack([w.zeros for w in weights]),
        order=torch.stack(orders) if orders else None,
        group_of=torch.stack(groups) if groups else None,
    )


def unpack_groups(weight: PackedGroups) -> Tensor:
    """Return the weight [out, in] in float32, its inputs in their own order; not for every step."""
    return _reference.dequantize(weight).t()


def grouped_linear(x: Tensor, weight: PackedGroups, bias: Tensor | None = None, addend: Tensor | None = None) -> Tensor:
    """Return x @ weight.T + bias + addend; bias and addend may be absent.

    x: [T, in], columns dense; bias: [out]; addend: [T, out], dense. A number of the weight may be rounded to the dtype
    of `x` before it is multiplied, sums are float32.
    """
    if on_gpu(x):
        from loraplex_kernels.gpu import grouped_linear as _gpu  # Triton exists on GPU machines only

        return _gpu.grouped_linear(x, weight, bias, addend)
    return _reference.grouped_linear(x, weight, bias, addend)
