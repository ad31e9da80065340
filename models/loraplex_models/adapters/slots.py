"""AdapterSlots: the adapters that are ready to compute with, and how a batch's tokens reach them."""

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from loraplex_kernels.lora import LoraLayout, choose_layout, pack_lora
from loraplex_models.forward import LoraBatch, LoraDelta, LoraTile
from loraplex_models.layers.linear import Linear

if TYPE_CHECKING:
    from loraplex_models.adapters.weights import AdapterWeights
    from loraplex_models.decoder import CausalLM

# Neighbouring segments are computed as one tile, every token against the ranks of all its adapters, until the products
# that are thrown away (tokens times rank rows) cost about as much as the calls that a tile of its own would take.
MAX_WASTED_PRODUCTS = 4096
# A stack that holds more adapters than the tile has is used as it is while its rank is at most this many times theirs.
MAX_SUPERSET_RATIO = 2
STACK_CACHE_BYTES = 256 * 2**20

NO_SLOT = -1


class _StackedLinear:
    """Several adapters' weights for one linear, side by side, packed in each layout that a batch has asked for."""

    def __init__(self, a: Tensor, b: Tensor, row_slots: tuple[int, ...]) -> None:
        self.row_slots = row_slots  # which slot each rank row is of
        self.num_bytes = a.nbytes + b.nbytes
        self._plain = (a, b)
        self._packed: dict[LoraLayout, tuple[Tensor, Tensor]] = {}

    def packed(self, num_tokens: int) -> tuple[Tensor, Tensor]:
        """Return A and B in the best layout for that many tokens."""
        a, b = self._plain
        layout = choose_layout(num_tokens, len(a), a.shape[1], b.shape[1], a.device)
        if layout not in self._packed:
            self._packed[layout] = pack_lora(a, b, layout)
            # An estimate: a packed tensor does not tell its size.
            self.num_bytes += 2 * (a.nbytes + b.nbytes) if layout is LoraLayout.SMALL else a.nbytes + b.nbytes
        return self._packed[layout]


@dataclass(frozen=True, slots=True)
class _Stack:
    """Several adapters' weights, by the linear's index."""

    slots: frozenset[int]
    linears: tuple[_StackedLinear | None, ...]

    @property
    def num_bytes(self) -> int:
        """Memory of all layouts made so far."""
        return sum(linear.num_bytes for linear in self.linears if linear is not None)


@dataclass(frozen=True, slots=True)
class _Segment:
    start: int
    end: int
    slot: int


class AdapterSlots:
    """A fixed number of slots, each empty or with one adapter.

    `route` stacks the adapters that a batch uses, and keeps the stacks for the batches to come, up to
    `stack_cache_bytes`. A slot that changes takes the stacks it is part of with it.
    """

    def __init__(self, model: "CausalLM", num_slots: int, *, stack_cache_bytes: int = STACK_CACHE_BYTES) -> None:
        self.num_slots = num_slots
        self._linears: tuple[Linear, ...] = model.linears
        self._dtype = model.dtype
        self._device = model.device
        self._stack_cache_bytes = stack_cache_bytes
        self._adapters: dict[int, AdapterWeights] = {}
        self._stacks: OrderedDict[frozenset[int], _Stack] = OrderedDict()
        self._last_route: tuple[tuple[int, ...], tuple[int, ...], LoraBatch | None] | None = None

    def set(self, slot: int, weights: "AdapterWeights") -> None:
        """Put an adapter into a slot, in place of what was there.

        Raises ValueError when a module is unknown, a shape does not fit, or a weight is not finite.
        """
        assert 0 <= slot < self.num_slots, f"slot {slot} of {self.num_slots}"
        self._check(weights)
        self.clear(slot)
        self._adapters[slot] = weights

    def clear(self, slot: int) -> None:
        """Empty a slot."""
        assert 0 <= slot < self.num_slots, f"slot {slot} of {self.num_slots}"
        self._adapters.pop(slot, None)
        for slots in [slots for slots in self._stacks if slot in slots]:
            del self._stacks[slots]
        self._last_route = None

    def route(self, segment_start: Sequence[int], segment_slots: Sequence[int]) -> LoraBatch | None:
        """Say how the step's tokens reach their adapters; None when no token has one.

        segment_start: N + 1 values from 0 to T; segment_slots: N slots, -1 for the base. A slot must be set. What
        comes back is valid until a slot of it is set or cleared.
        """
        starts, slots = tuple(segment_start), tuple(segment_slots)
        if self._last_route is not None and self._last_route[:2] == (starts, slots):
            return self._last_route[2]
        batch = self._new_route(starts, slots)
        self._last_route = (starts, slots, batch)
        return batch

    def _new_route(self, starts: tuple[int, ...], slots: tuple[int, ...]) -> LoraBatch | None:
        segments = [
            _Segment(starts[i], starts[i + 1], slot) for i, slot in enumerate(slots) if starts[i] < starts[i + 1]
        ]
        used = {segment.slot for segment in segments} - {NO_SLOT}
        if not used:
            return None
        lengths = torch.tensor([starts[i + 1] - starts[i] for i in range(len(slots))])
        token_slots = torch.tensor(slots, dtype=torch.int32).repeat_interleave(lengths).to(self._device)
        tiles = tuple(self._make_tile(tile, token_slots) for tile in self._split(segments))
        self._drop_old_stacks()
        return LoraBatch(
            token_slots=token_slots,
            segment_start=starts,
            segment_slots=slots,
            max_rank=max(self._adapters[slot].rank for slot in used),
            tiles=tiles,
        )

    def _split(self, segments: list[_Segment]) -> list[list[_Segment]]:
        """Cut the segments into tiles. The base's tokens join a tile when they stand inside it or cost it little."""
        tiles: list[list[_Segment]] = []
        for segment in segments:
            if tiles and self._wasted_products([*tiles[-1], segment]) <= MAX_WASTED_PRODUCTS:
                tiles[-1].append(segment)
            else:
                tiles.append([segment])
        return [tile for tile in tiles if any(segment.slot != NO_SLOT for segment in tile)]

    def _wasted_products(self, tile: list[_Segment]) -> int:
        ranks = {segment.slot: self._rank(segment.slot) for segment in tile}
        useful = sum((segment.end - segment.start) * ranks[segment.slot] for segment in tile)
        return (tile[-1].end - tile[0].start) * sum(ranks.values()) - useful

    def _rank(self, slot: int) -> int:
        return 0 if slot == NO_SLOT else self._adapters[slot].rank

    def _make_tile(self, segments: list[_Segment], token_slots: Tensor) -> LoraTile:
        slots = frozenset(segment.slot for segment in segments if segment.slot != NO_SLOT)
        has_base = any(segment.slot == NO_SLOT for segment in segments)
        start, end = segments[0].start, segments[-1].end
        stack = self._find_stack(slots)
        is_uniform = len(stack.slots) == 1 and not has_base
        tile_slots = token_slots[start:end].unsqueeze(1)
        foreign: dict[tuple[int, ...], Tensor] = {}  # layers of equal ranks share one mask
        deltas: list[LoraDelta | None] = []
        for linear in stack.linears:
            if linear is None or slots.isdisjoint(linear.row_slots):
                deltas.append(None)
                continue
            row_slots = linear.row_slots
            if not is_uniform and row_slots not in foreign:
                foreign[row_slots] = tile_slots != torch.tensor(row_slots, device=self._device)
            deltas.append(LoraDelta(*linear.packed(end - start), foreign.get(row_slots)))
        return LoraTile(start, end, tuple(deltas))

    def _find_stack(self, slots: frozenset[int]) -> _Stack:
        key = slots if slots in self._stacks else self._superset(slots)
        if key is None:
            key = slots
            self._stacks[key] = _Stack(
                slots, tuple(self._stack_linear(fused, sorted(slots)) for fused in self._linears)
            )
        self._stacks.move_to_end(key)
        return self._stacks[key]

    def _drop_old_stacks(self) -> None:
        total = sum(stack.num_bytes for stack in self._stacks.values())
        while total > self._stack_cache_bytes and len(self._stacks) > 1:
            total -= self._stacks.popitem(last=False)[1].num_bytes

    def _superset(self, slots: frozenset[int]) -> frozenset[int] | None:
        limit = MAX_SUPERSET_RATIO * self._total_rank(slots)
        fitting = [kept for kept in self._stacks if kept > slots and self._total_rank(kept) <= limit]
        return min(fitting, key=self._total_rank, default=None)

    def _total_rank(self, slots: Iterable[int]) -> int:
        return sum(self._rank(slot) for slot in slots)

    def _stack_linear(self, linear: Linear, slots: list[int]) -> _StackedLinear | None:
        """Stack the adapters' weights: each fused module reads the whole input and writes its own columns."""
        rows, columns, row_slots = [], [], []
        out_size = sum(linear.parts.values())
        for slot in slots:
            first_column = 0
            for module, size in linear.parts.items():
                if (weights := self._adapters[slot].modules.get(module)) is not None:
                    a, b = (weight.to(self._device, self._dtype) for weight in weights)
                    rows.append(a)
                    wide = b.new_zeros(len(a), out_size)
                    wide[:, first_column : first_column + size] = b.t()
                    columns.append(wide)
                    row_slots.extend([slot] * len(a))
                first_column += size
        if not rows:
            return None
        return _StackedLinear(torch.cat(rows), torch.cat(columns), tuple(row_slots))

    def _check(self, weights: "AdapterWeights") -> None:
        sizes = {
            module: (linear.in_size, out_size) for linear in self._linears for module, out_size in linear.parts.items()
        }
        for module, (a, b) in weights.modules.items():
            if module not in sizes:
                raise ValueError(f"the model has no linear '{module}'")
            in_size, out_size = sizes[module]
            if a.shape[1:] != (in_size,) or b.shape != (out_size, len(a)):
                raise ValueError(
                    f"'{module}' is [{out_size}, {in_size}]; A {list(a.shape)} and B {list(b.shape)} do not fit it"
                )
            # A weight that is not finite would reach other adapters' tokens: 0 * inf is not 0.
            if not (a.isfinite().all() and b.isfinite().all()):
                raise ValueError(f"'{module}' has weights that are not finite")
