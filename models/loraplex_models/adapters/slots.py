"""AdapterSlots: the adapters that are ready to compute with, and how a batch's tokens reach them."""

from collections.abc import Sequence, Set
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from torch import Tensor

from loraplex_kernels.dispatch import has_gpu_forms
from loraplex_kernels.lora import LoraSegments, LoraTable
from loraplex_models.adapters.finish import finish_end, finish_linear
from loraplex_models.forward import LoraBatch
from loraplex_models.layers.expert_lora import ExpertPairs, ExpertSlots
from loraplex_models.layers.linear import Linear
from loraplex_models.layers.lora_extras import EmbeddingExtras, EndChange, HeadExtras, LinearExtras, OutputChange

if TYPE_CHECKING:
    from loraplex_models.adapters.weights import AdapterWeights
    from loraplex_models.decoder import CausalLM

NO_SLOT = -1


@dataclass(frozen=True, slots=True)
class PreparedAdapter:
    """An adapter's weights where and as the slots want them: linear's index, part, A [rank, in], B [out, rank].

    `changes` are those of the linears' outputs, by index and part.
    """

    modules: tuple[tuple[int, int, Tensor, Tensor], ...]
    changes: tuple[tuple[int, int, OutputChange], ...] = ()
    embedding: EndChange | None = None
    head: EndChange | None = None
    experts: ExpertPairs = field(default_factory=dict)

    def has_arrived(self) -> bool:
        """Whether all of it is on the device; never waits."""
        return True


class AdapterSlots:
    """A fixed number of slots, each empty or with one adapter, at the adapter's own size."""

    def __init__(self, model: "CausalLM", num_slots: int) -> None:
        self.num_slots = num_slots
        self._model = model
        self._linears: tuple[Linear, ...] = model.linears
        self._dtype = model.dtype
        self._device = model.device
        self._tables = tuple(
            LoraTable(num_slots, tuple(linear.parts.values()), model.dtype, model.device) for linear in self._linears
        )
        self._extras = tuple(LinearExtras(tuple(linear.parts.values())) for linear in self._linears)
        self._embedding, self._head = EmbeddingExtras(), HeadExtras()
        self._experts = _expert_slots(model, num_slots)
        self._with_extras: set[int] = set()  # slots whose adapters bring more than products
        self._places = {
            module: (linear.index, part) for linear in self._linears for part, module in enumerate(linear.parts)
        }
        self._last_route: tuple[tuple[int, ...], tuple[int, ...], LoraBatch | None] | None = None

    def arrange(self, weights: "AdapterWeights") -> "AdapterWeights":
        """Lay an adapter out in host memory as `prepare` takes it fastest; here it is so already."""
        return weights

    def prepare(self, weights: "AdapterWeights") -> PreparedAdapter:
        """Check an adapter and bring it to the device; changes nothing here, so that any thread may call it.

        Raises ValueError when a module is unknown, a shape does not fit, or a weight is not finite.
        """
        pairs, rest = self._finish(weights)
        modules: list[tuple[int, int, Tensor, Tensor]] = []
        for module, (a, b) in pairs.items():
            a = a.to(self._device, self._dtype).contiguous()
            # The tables want a rank's row of B dense.
            b = b.to(self._device, self._dtype).t().contiguous().t()
            modules.append((*self._places[module], a, b))
        experts = {
            place: (a.to(self._device, self._dtype), b.to(self._device, self._dtype))
            for place, (a, b) in weights.experts.items()
        }
        return replace(rest, modules=tuple(modules), experts=experts)

    def _finish(self, weights: "AdapterWeights") -> tuple[dict[str, tuple[Tensor, Tensor]], PreparedAdapter]:
        """Check an adapter and work out what it needs of the base: A and B by module, all but experts on the device."""
        self._check(weights)
        pairs = dict(weights.modules)
        changes: list[tuple[int, int, OutputChange]] = []
        for module, parts in weights.parts.items():
            pair, change = finish_linear(self._model, module, pairs.get(module), parts, weights.sums)
            if pair is not None:
                pairs[module] = pair
            changes.append((*self._places[module], change.to(self._device, self._dtype)))
        ends = {
            name: finish_end(self._model, name, end, weights.sums).to(self._device, self._dtype)
            for name, end in weights.ends.items()
        }
        return pairs, PreparedAdapter((), tuple(changes), ends.get("embed_tokens"), ends.get("lm_head"))

    def install(self, slot: int, adapter: PreparedAdapter) -> None:
        """Put an adapter into a slot, in place of what was there; no weight is copied."""
        self.clear(slot)
        for index, part, a, b in adapter.modules:
            self._tables[index].set(slot, part, a, b)
        for index, part, change in adapter.changes:
            self._extras[index].set(slot, part, change)
        if adapter.changes or adapter.embedding is not None or adapter.head is not None:
            self._with_extras.add(slot)
        if adapter.experts and self._experts is not None:
            self._experts.set(slot, adapter.experts)
        if adapter.embedding is not None:
            self._embedding.set(slot, adapter.embedding)
        if adapter.head is not None:
            self._head.set(slot, adapter.head)

    def drop(self, adapter: "AdapterWeights | PreparedAdapter") -> None:
        """Give back the memory of what `arrange` gave, or of what `prepare` gave and no slot has had."""

    def set(self, slot: int, weights: "AdapterWeights") -> None:
        """Prepare and install in one call. Raises ValueError as `prepare` does, and then changes nothing."""
        self.install(slot, self.prepare(weights))

    def clear(self, slot: int) -> None:
        """Empty a slot."""
        assert 0 <= slot < self.num_slots, f"slot {slot} of {self.num_slots}"
        for table in self._tables:
            table.clear(slot)
        if self._experts is not None:
            self._experts.clear(slot)
        if slot in self._with_extras:
            self._with_extras.remove(slot)
            for extras in self._extras:
                extras.clear(slot)
            for end in (self._embedding, self._head):
                end.clear(slot)
        self._last_route = None

    def need_plain_steps(self, slots: Set[int]) -> bool:
        """Whether an adapter of these slots asks for what captured steps leave out: all that is no product."""
        return not self._with_extras.isdisjoint(slots)

    def route(self, segment_start: Sequence[int], segment_slots: Sequence[int]) -> LoraBatch | None:
        """Say how the step's tokens reach their adapters; None when no token has one.

        segment_start: N + 1 values from 0 to T; segment_slots: N slots, -1 for the base. What comes back is valid until
        a slot of it is set or cleared.
        """
        starts, slots = tuple(segment_start), tuple(segment_slots)
        if self._last_route is not None and self._last_route[:2] == (starts, slots):
            return self._last_route[2]
        used = frozenset(slots) - {NO_SLOT}
        batch = None
        if used:
            batch = LoraBatch(
                segments=LoraSegments(starts, slots),
                tables=tuple(None if used.isdisjoint(table.slots) else table for table in self._tables),
            )
            if self._experts is not None and not used.isdisjoint(self._experts.slots):
                batch = replace(batch, experts=self._experts.deltas(starts, slots))
            if not used.isdisjoint(self._with_extras):
                batch = self._with_changes(batch, used)
        self._last_route = (starts, slots, batch)
        return batch

    @property
    def _takes_experts(self) -> bool:
        """Whether adapters may change experts."""
        return self._experts is not None

    def _with_changes(self, batch: LoraBatch, used: frozenset[int]) -> LoraBatch:
        extras = tuple(None if used.isdisjoint(extra.slots) else extra for extra in self._extras)
        return replace(
            batch,
            extras=extras if any(extras) else None,
            embedding=None if used.isdisjoint(self._embedding.slots) else self._embedding,
            head=None if used.isdisjoint(self._head.slots) else self._head,
        )

    def _check(self, weights: "AdapterWeights") -> None:
        if weights.experts and not self._takes_experts:
            raise ValueError("LoRA on experts is served on a base model with experts only")
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


def _expert_slots(model: "CausalLM", num_slots: int) -> ExpertSlots | None:
    """Room for pairs on experts; None where the model has no experts, or they are computed otherwise."""
    experts = model.config.experts
    if experts is None or has_gpu_forms(model.device):
        return None
    layers = [layer.index for layer in model.layers if layer.index not in experts.dense_layers]
    sizes = (experts.inner_size, experts.inner_size), (model.config.hidden_size,)
    return ExpertSlots(layers, sizes, experts.num_experts, num_slots, model.dtype, model.device)
