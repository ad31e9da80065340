"""Which tier each adapter is in, who pins it, and what to load or evict next; touches no tensor.

Tiers: disk (known by path) → host (weights in memory) → device (in a slot that a batch can name). The manager only
decides; the ranks obey the AdapterOps that it hands to the next StepPlan, and report when a host load has ended.
"""

from dataclasses import dataclass
from typing import Literal

from loraplex_server.engine.step import AdapterOp
from loraplex_server.messages import AdapterSpec

Tier = Literal["disk", "loading", "host", "device"]


@dataclass(slots=True, eq=False)
class AdapterRecord:
    """One adapter version, by the digest of its content."""

    spec: AdapterSpec
    tier: Tier = "disk"
    num_bytes: int = 0  # in host memory; known after the first load
    slot: int = -1
    num_pins: int = 0  # sequences running with it
    num_waiting: int = 0  # sequences that will need it
    last_used: int = 0  # the manager's clock
    error: str | None = None
    is_forgotten: bool = False  # unloaded by name; goes when nobody uses it


class AdapterManager:
    """Rank 0's view of all adapters, keyed by content digest."""

    def __init__(self, num_slots: int, host_budget_bytes: int):
        self._records: dict[str, AdapterRecord] = {}
        self._free_slots = list(range(num_slots - 1, -1, -1))
        self._host_budget_bytes = host_budget_bytes
        self._clock = 0
        self._ops: list[AdapterOp] = []

    def register(self, spec: AdapterSpec) -> None:
        """Make a version known. Knowing it again by the same digest changes nothing but its name."""
        record = self._records.get(spec.digest)
        if record is None:
            self._records[spec.digest] = AdapterRecord(spec=spec)
        else:
            record.spec = spec
            record.is_forgotten = False

    def forget(self, digest: str) -> None:
        """Drop a version; its memory is given back when no sequence uses it."""
        record = self._records.get(digest)
        if record is not None:
            record.is_forgotten = True
            self._drop_if_unused(record)

    def expect(self, digest: str) -> str | None:
        """A sequence that needs this version has arrived: start loading it. Returns the reason if that is in vain."""
        record = self._records.get(digest)
        if record is None:
            return "the adapter is not known to the engine; it may have been unloaded"
        record.num_waiting += 1
        if record.tier == "disk":
            record.error = None  # the file may have come back since a failed try
            record.tier = "loading"
            self._ops.append(AdapterOp(kind="host_load", digest=digest, path=record.spec.path))
        return None

    def unexpect(self, digest: str) -> None:
        """A waiting sequence has left."""
        record = self._records[digest]
        record.num_waiting -= 1
        self._drop_if_unused(record)

    def loaded(self, digest: str, num_bytes: int, error: str | None) -> None:
        """A host load has ended on every rank."""
        record = self._records[digest]
        record.tier, record.num_bytes, record.error = ("disk", 0, error) if error else ("host", num_bytes, None)
        record.last_used = self._tick()
        self._drop_if_unused(record)
        self._evict_host()

    def error_of(self, digest: str) -> str | None:
        """Why the last load failed, if it did."""
        return self._records[digest].error

    def is_loaded(self, digest: str) -> bool:
        """Whether the version's weights are in memory, so that only a slot could be missing."""
        return self._records[digest].tier in ("host", "device")

    def can_acquire(self, digest: str) -> bool:
        """Whether `acquire` would give a slot now."""
        record = self._records[digest]
        has_slot = bool(self._free_slots) or any(r.tier == "device" and r.num_pins == 0 for r in self._records.values())
        return record.tier == "device" or (record.tier == "host" and has_slot)

    def acquire(self, digest: str) -> int:
        """Pin the version's slot for one waiting sequence, which runs from now on; `can_acquire` holds."""
        record = self._records[digest]
        if record.tier == "host":
            self._enter_slot(record)
        record.num_pins += 1
        record.num_waiting -= 1
        record.last_used = self._tick()
        return record.slot

    def release(self, digest: str, *, will_return: bool = False) -> None:
        """Unpin for one running sequence; with `will_return` (a preemption) it waits again."""
        record = self._records[digest]
        record.num_pins -= 1
        record.num_waiting += will_return
        self._drop_if_unused(record)

    def take_ops(self) -> list[AdapterOp]:
        """What the ranks have to do before the next forward pass, in order."""
        ops, self._ops = self._ops, []
        return ops

    @property
    def has_ops(self) -> bool:
        """Whether the ranks have something to do."""
        return bool(self._ops)

    @property
    def num_loading(self) -> int:
        """Adapters on their way into host memory."""
        return sum(record.tier == "loading" for record in self._records.values())

    @property
    def num_pins(self) -> int:
        """Sequences running with an adapter."""
        return sum(record.num_pins for record in self._records.values())

    def resident_ids(self) -> list[str]:
        """Names of the adapters in slots."""
        return [record.spec.adapter_id for record in self._records.values() if record.tier == "device"]

    def _tick(self) -> int:
        self._clock += 1
        return self._clock

    def _enter_slot(self, record: AdapterRecord) -> None:
        if not self._free_slots:
            idle = (r for r in self._records.values() if r.tier == "device" and r.num_pins == 0)
            # One that somebody waits for goes only when all idle ones are waited for.
            self._leave_slot(min(idle, key=lambda r: (r.num_waiting > 0, r.last_used)))
        record.slot = self._free_slots.pop()
        record.tier = "device"
        self._ops.append(AdapterOp(kind="slot_load", digest=record.spec.digest, slot=record.slot))

    def _leave_slot(self, record: AdapterRecord) -> None:
        self._ops.append(AdapterOp(kind="slot_clear", digest=record.spec.digest, slot=record.slot))
        self._free_slots.append(record.slot)
        record.slot, record.tier = -1, "host"

    def _leave_host(self, record: AdapterRecord) -> None:
        self._ops.append(AdapterOp(kind="host_evict", digest=record.spec.digest))
        record.tier, record.num_bytes = "disk", 0

    def _evict_host(self) -> None:
        in_memory = [r for r in self._records.values() if r.tier in ("host", "device")]
        excess = sum(r.num_bytes for r in in_memory) - self._host_budget_bytes
        idle = [r for r in in_memory if r.num_pins == 0 and r.num_waiting == 0]
        for record in sorted(idle, key=lambda r: r.last_used):
            if excess <= 0:
                return
            excess -= record.num_bytes
            if record.tier == "device":
                self._leave_slot(record)
            self._leave_host(record)

    def _drop_if_unused(self, record: AdapterRecord) -> None:
        if not record.is_forgotten or record.num_pins or record.num_waiting or record.tier == "loading":
            return
        if record.tier == "device":
            self._leave_slot(record)
        if record.tier == "host":
            self._leave_host(record)
        del self._records[record.spec.digest]
