"""The deltas that adapters add within experts."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from loraplex_kernels.lora import LoraSegments, LoraTable, lora_expand, lora_shrink
from loraplex_kernels.moe import ExpertRoute

# An expert's two linears: one reads the hidden state, the other the inner one.
UP, DOWN = range(2)
# By name which of the two, and the part of its output.
PLACES = {"gate": (UP, 0), "up": (UP, 1), "down": (DOWN, 0)}
# By layer, which of the two linears, part and expert: A [rank, in] and B [out, rank].
ExpertPairs = dict[tuple[int, int, int, int], tuple[Tensor, Tensor]]


@dataclass(frozen=True, slots=True)
class LayerDeltas:
    """What one step's adapters add within one layer's experts, row by row of its route."""

    tables: tuple[LoraTable, LoraTable]
    segments: LoraSegments

    def add(self, linear: int, rows: Tensor, out: Tensor) -> None:
        """Add to the product `out` of the rows with the gate and up weights (0) or the down weights (1), in place."""
        table = self.tables[linear]
        if table.slots:
            lora_expand(lora_shrink(rows, table, self.segments), table, self.segments, out)


@dataclass(frozen=True, slots=True)
class ExpertDeltas:
    """The same for all layers, before the tokens are routed. `token_slots`: [T] int64, -1 for no adapter."""

    token_slots: Tensor
    tables: dict[int, tuple[LoraTable, LoraTable]]
    num_experts: int

    def of_layer(self, layer: int, route: ExpertRoute) -> LayerDeltas | None:
        """Return those of one layer, None where no adapter of the model touches its experts."""
        tables = self.tables.get(layer)
        if tables is None or not (tables[0].slots or tables[1].slots):
            return None
        counts = torch.tensor(route.starts).diff()
        experts = torch.arange(self.num_experts).repeat_interleave(counts)
        slots = self.token_slots[route.tokens]
        # Each expert of each slot has a place of its own in the tables.
        keys, lengths = torch.unique_consecutive(
            torch.where(slots < 0, -1, slots * self.num_experts + experts), return_counts=True
        )
        starts = [0, *lengths.cumsum(0).tolist()]
        return LayerDeltas(tables, LoraSegments(starts, keys.tolist()))


class ExpertSlots:
    """The adapters' pairs for experts, by slot."""

    def __init__(
        self,
        layers: Sequence[int],
        sizes: tuple[tuple[int, ...], tuple[int, ...]],
        num_experts: int,
        num_slots: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """`layers` have experts; `sizes` are the part sizes of their two linears."""
        self.slots: set[int] = set()
        self._num_experts = num_experts
        self._tables = {
            layer: (
                LoraTable(num_slots * num_experts, sizes[0], dtype, device),
                LoraTable(num_slots * num_experts, sizes[1], dtype, device),
            )
            for layer in layers
        }

    def set(self, slot: int, pairs: ExpertPairs) -> None:
        """Put an adapter's pairs in."""
        for (layer, linear, part, expert), (a, b) in pairs.items():
            self._tables[layer][linear].set(slot * self._num_experts + expert, part, a, b)
        if pairs:
            self.slots.add(slot)

    def clear(self, slot: int) -> None:
        """Take an adapter's pairs out."""
        if slot not in self.slots:
            return
        self.slots.remove(slot)
        for tables in self._tables.values():
            for table in tables:
                for expert in range(self._num_experts):
                    table.clear(slot * self._num_experts + expert)

    def deltas(self, starts: Sequence[int], slots: Sequence[int]) -> ExpertDeltas:
        """Return what a step's tokens get; starts and slots as in `LoraSegments`."""
        lengths = torch.tensor(starts).diff()
        return ExpertDeltas(torch.tensor(slots).repeat_interleave(lengths), self._tables, self._num_experts)
