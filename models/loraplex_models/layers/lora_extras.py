"""What some adapters bring beside A and B: gains and shifts of linears, and changes of the embedding and the head.

Batches without such adapters never come here. All is applied in place, segment by segment.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from loraplex_kernels.linear import linear
from loraplex_kernels.lora import LoraSegments


@dataclass(frozen=True, slots=True)
class OutputChange:
    """out ← out + (gain - 1) · out + shift, by output; of DoRA, trained biases and biases of B. Each [out]."""

    gain_minus_one: Tensor | None
    shift: Tensor | None

    @property
    def num_bytes(self) -> int:
        """Memory of both."""
        return sum(tensor.nbytes for tensor in (self.gain_minus_one, self.shift) if tensor is not None)

    def to(self, device: torch.device, dtype: torch.dtype) -> "OutputChange":
        """The same on a device, in a float type."""
        gain, shift = (
            None if vector is None else vector.to(device, dtype) for vector in (self.gain_minus_one, self.shift)
        )
        return OutputChange(gain, shift)

    def apply(self, out: Tensor) -> None:
        """Change `out`, [rows, out] of any float type, in place; computed in float32."""
        if self.gain_minus_one is not None:
            change = out.float() * self.gain_minus_one
            out += change if self.shift is None else change + self.shift
        elif self.shift is not None:
            out += self.shift


class LinearExtras:
    """The output changes of one linear by slot and part."""

    def __init__(self, part_sizes: tuple[int, ...]) -> None:
        starts = [sum(part_sizes[:part]) for part in range(len(part_sizes))]
        self._columns = [slice(start, start + size) for start, size in zip(starts, part_sizes, strict=True)]
        self._changes: dict[int, dict[int, OutputChange]] = {}

    @property
    def slots(self) -> frozenset[int]:
        """Whose adapters change this linear's output."""
        return frozenset(self._changes)

    def set(self, slot: int, part: int, change: OutputChange) -> None:
        """Put one module's change in."""
        self._changes.setdefault(slot, {})[part] = change

    def clear(self, slot: int) -> None:
        """Take an adapter's changes out."""
        self._changes.pop(slot, None)

    def apply(self, out: Tensor, segments: LoraSegments) -> None:
        """Change the base's product with its bias, [T, sum of the parts' sizes], before anything is added to it."""
        for start, end, slot in segments.all:
            for part, change in self._changes.get(slot, {}).items():
                change.apply(out[start:end, self._columns[part]])


@dataclass(frozen=True, slots=True)
class EndChange:
    """One adapter's change of the embedding or of the head.

    `weight` [vocab, hidden] takes the whole matrix's place; `rows` [n, hidden] those of `row_ids` (ascending); `a` and
    `b` are a low-rank delta, scaling and gain in b: of the embedding a [vocab, rank], b [rank, hidden], of the head
    a [rank, hidden], b [vocab, rank].
    """

    weight: Tensor | None = None
    row_ids: Tensor | None = None
    rows: Tensor | None = None
    a: Tensor | None = None
    b: Tensor | None = None
    change: OutputChange | None = None

    @property
    def num_bytes(self) -> int:
        """Memory of all tensors."""
        tensors = (self.weight, self.row_ids, self.rows, self.a, self.b)
        own = sum(tensor.nbytes for tensor in tensors if tensor is not None)
        return own + (0 if self.change is None else self.change.num_bytes)

    def to(self, device: torch.device, dtype: torch.dtype) -> "EndChange":
        """The same on a device, in a float type."""
        weight, rows, a, b = (
            None if tensor is None else tensor.to(device, dtype) for tensor in (self.weight, self.rows, self.a, self.b)
        )
        return EndChange(
            weight,
            None if self.row_ids is None else self.row_ids.to(device),
            rows,
            a,
            b,
            None if self.change is None else self.change.to(device, dtype),
        )


class _EndExtras:
    """Changes of one end of the model by slot."""

    def __init__(self) -> None:
        self._changes: dict[int, EndChange] = {}

    @property
    def slots(self) -> frozenset[int]:
        """Whose adapters change it."""
        return frozenset(self._changes)

    def set(self, slot: int, change: EndChange) -> None:
        """Put an adapter's change in."""
        self._changes[slot] = change

    def clear(self, slot: int) -> None:
        """Take an adapter's change out."""
        self._changes.pop(slot, None)


class EmbeddingExtras(_EndExtras):
    """How adapters change embedded tokens."""

    def apply(self, x: Tensor, token_ids: Tensor, segments: LoraSegments) -> None:
        """Change the embedded tokens x [T, hidden] of the adapters that do so."""
        for start, end, slot in segments.all:
            change = self._changes.get(slot)
            if change is not None:
                _change_embedded(change, x[start:end], token_ids[start:end])


def _change_embedded(end: EndChange, x: Tensor, token_ids: Tensor) -> None:
    if end.weight is not None:
        x.copy_(end.weight.index_select(0, token_ids))
    if end.row_ids is not None and end.rows is not None:
        places = torch.searchsorted(end.row_ids, token_ids).clamp_(max=len(end.row_ids) - 1)
        is_replaced = end.row_ids[places] == token_ids
        x[is_replaced] = end.rows[places[is_replaced]]
    if end.change is not None:
        end.change.apply(x)
    if end.a is not None and end.b is not None:
        x += end.a.index_select(0, token_ids) @ end.b


class HeadExtras(_EndExtras):
    """How adapters change logits."""

    def apply(self, logits: Tensor, hidden: Tensor, sample_rows: Tensor, segments: LoraSegments) -> None:
        """Change the logits [S, vocab] of hidden states [S, hidden]; `sample_rows` (ascending): their rows of T."""
        for first, last, slot in _sampled(sample_rows, segments):
            change = self._changes.get(slot)
            if change is not None and first < last:
                _change_logits(change, logits[first:last], hidden[first:last])


def _sampled(sample_rows: Tensor, segments: LoraSegments) -> Iterator[tuple[int, int, int]]:
    """The segments as runs of sampled rows."""
    borders = torch.tensor([border for segment in segments.all for border in segment[:2]])
    places = torch.searchsorted(sample_rows.cpu(), borders).tolist()
    for index, (_, _, slot) in enumerate(segments.all):
        yield places[2 * index], places[2 * index + 1], slot


def _change_logits(end: EndChange, logits: Tensor, hidden: Tensor) -> None:
    if end.weight is not None:
        logits.copy_(linear(hidden, end.weight))
    if end.row_ids is not None and end.rows is not None:
        logits[:, end.row_ids] = linear(hidden, end.rows).to(logits.dtype)
    if end.change is not None:
        end.change.apply(logits)
    if end.a is not None and end.b is not None:
        logits += (hidden @ end.a.t()) @ end.b.t()
