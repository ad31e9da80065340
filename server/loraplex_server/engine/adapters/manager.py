"""Which tier each adapter is in, who pins it, and what to load or evict next; touches no tensor.

Tiers: disk (known by path) → host (weights in memory) → device (in a slot that a batch can name). What is on the device
is in host memory too. The manager only decides; the ranks obey the AdapterOps that it hands to the next StepPlan, and
report when a load has ended. Loads run in the ranks' threads beside the steps: an adapter that is on its way into a
tier has taken its bytes there, and is in it once every rank has reported.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from loraplex_server.engine.adapters.host_cache import FinishedLoad
from loraplex_server.engine.adapters.tier_pool import TierPool
from loraplex_server.engine.step import AdapterOp
from loraplex_server.messages import AdapterSpec, AdapterStatus

Tier = Literal["disk", "loading", "host", "entering", "device"]

# Loads handed to a tier's threads at a time: enough to keep them busy, few enough that the next one is the one that
# is needed next.
MAX_LOADS_IN_FLIGHT = 4
# Only so many adapters of the waiting sequences, the nearest ones, are loaded ahead.
PREFETCH_WINDOW = 64
# What a load takes however small it is, in bytes that could be moved meanwhile: opening and hashing files costs
# milliseconds at about 1 GB/s, a copy to the device a tenth of one at about 20 GB/s.
HOST_LOAD_OVERHEAD_BYTES = 4 * 1024 * 1024
DEVICE_LOAD_OVERHEAD_BYTES = 2 * 1024 * 1024
MIB = 1024 * 1024

# What is on its way into a tier is not in it yet.
_REPORTED: dict[Tier, Literal["disk", "host", "device"]] = {
    "disk": "disk",
    "loading": "disk",
    "host": "host",
    "entering": "host",
    "device": "device",
}


@dataclass(slots=True, eq=False)
class AdapterRecord:
    """One adapter version, by the digest of its content."""

    spec: AdapterSpec
    num_bytes: int  # in host memory: as the header says, then as it was loaded
    device_bytes: int
    tier: Tier = "disk"
    slot: int = -1
    num_pins: int = 0  # sequences running with it
    num_waiting: int = 0  # sequences that will need it
    is_kept: bool = False  # loaded without being waited for, and evicted last
    is_forgotten: bool = False  # unloaded by name; goes when nobody uses it


@dataclass(slots=True)
class LoadCounts:
    """What has happened to adapters since the last report."""

    host_loads: int = 0
    device_loads: int = 0
    host_evictions: int = 0
    device_evictions: int = 0
    failed_loads: int = 0
    host_load_s: list[float] = field(default_factory=list)
    device_load_s: list[float] = field(default_factory=list)


class AdapterManager:
    """Rank 0's view of all adapters, keyed by content digest.

    `device_bytes_of` says what an adapter takes on the device; without it that is what its tensors take in the file.
    """

    def __init__(
        self,
        num_slots: int,
        *,
        host_budget_bytes: int,
        device_budget_bytes: int,
        device_bytes_of: Callable[[AdapterSpec], int] = lambda spec: spec.num_bytes,
    ):
        self.host = TierPool(host_budget_bytes, HOST_LOAD_OVERHEAD_BYTES)
        self.device = TierPool(device_budget_bytes, DEVICE_LOAD_OVERHEAD_BYTES)
        self.num_pins = 0  # sequences running with an adapter
        self._device_bytes_of = device_bytes_of
        self._records: dict[str, AdapterRecord] = {}
        self._kept: dict[str, None] = {}
        self._statuses: dict[str, AdapterStatus] = {}
        self._free_slots = list(range(num_slots - 1, -1, -1))
        self._num_loading = 0
        self._num_entering = 0
        self._ops: list[AdapterOp] = []
        self._failed: list[tuple[str, str]] = []
        self._counts = LoadCounts()

    def register(self, spec: AdapterSpec) -> None:
        """Make a version known. Knowing it again by the same digest changes nothing but its name."""
        record = self._records.get(spec.digest)
        if record is None:
            self._records[spec.digest] = AdapterRecord(spec, spec.num_bytes, self._device_bytes_of(spec))
        else:
            record.spec = spec
            record.is_forgotten = False

    def forget(self, digest: str) -> None:
        """Drop a version; its memory is given back when no sequence uses it."""
        record = self._records.get(digest)
        if record is not None:
            record.is_forgotten = True
            self._drop_if_unused(record)

    def keep(self, digest: str, is_kept: bool) -> None:
        """Have a version loaded although nobody waits for it, and evicted last; or treat it like the others again."""
        record = self._records.get(digest)
        if record is not None:
            record.is_kept = is_kept
            if is_kept:
                self._kept[digest] = None
            else:
                self._kept.pop(digest, None)

    def expect(self, digest: str) -> str | None:
        """A sequence that needs this version has arrived. Returns the reason if that is in vain."""
        record = self._records.get(digest)
        if record is None:
            return "the adapter is not known to the engine; it may have been unloaded"
        reason = self._too_large(record.num_bytes, record.device_bytes)
        if reason is None:
            record.num_waiting += 1
        return reason

    def unexpect(self, digest: str) -> None:
        """A waiting sequence has left."""
        record = self._records[digest]
        record.num_waiting -= 1
        self._drop_if_unused(record)

    def want(self, wanted: Mapping[str, bool]) -> str | None:
        """Start the loads that waiting sequences need: their versions in the order they are needed, nearest first.

        The value tells whether a version presses: only then may it take the place of idle ones that are needed later,
        and no load may pass it. What nobody waits for goes first. Returns the first that presses and finds no room.
        Those that are kept are wanted after all others.
        """
        wanted = dict(wanted) | {d: False for d in self._kept if d not in wanted and not self.is_ready(d)}
        crowded_out: str | None = None
        # Not wanted: 0. Who does not press has the limit 1, and so only takes the place of those.
        nearness = {digest: len(wanted) - index + 1 for index, digest in enumerate(wanted)}
        host_is_open = device_is_open = True
        for digest in list(wanted)[:PREFETCH_WINDOW]:
            record, presses = self._records[digest], wanted[digest]
            limit = nearness[digest] if presses else 1
            has_room = True
            if record.tier == "disk" and host_is_open and self._num_loading < MAX_LOADS_IN_FLIGHT:
                has_room = self._start_host_load(record, nearness, limit)
                host_is_open = has_room or not presses
            elif record.tier == "host" and device_is_open and self._num_entering < MAX_LOADS_IN_FLIGHT:
                has_room = self._start_device_load(record, nearness, limit)
                device_is_open = has_room or not presses
            if presses and not has_room and crowded_out is None:
                crowded_out = digest
        return crowded_out

    def finished(self, load: FinishedLoad) -> None:
        """A load has ended on every rank."""
        record = self._records[load.digest]
        if load.tier == "host":
            self._finish_host_load(record, load)
        else:
            self._finish_device_load(record, load)
        self._drop_if_unused(record)

    def take_failed(self) -> list[tuple[str, str]]:
        """Versions whose load has failed since the last call, with the reason."""
        failed, self._failed = self._failed, []
        return failed

    def take_counts(self) -> LoadCounts:
        """What was counted since the last call."""
        counts, self._counts = self._counts, LoadCounts()
        return counts

    def invocation_of(self, digest: str | None) -> tuple[int, ...]:
        """The tokens that wake a version, if it is an activated adapter."""
        record = None if digest is None else self._records.get(digest)
        return () if record is None else record.spec.invocation_token_ids

    def is_ready(self, digest: str) -> bool:
        """Whether `acquire` would give a slot now."""
        return self._records[digest].tier == "device"

    def acquire(self, digest: str) -> int:
        """Pin the version's slot for one waiting sequence, which runs from now on; `is_ready` holds."""
        record = self._records[digest]
        assert record.tier == "device", f"adapter {digest} is {record.tier}"
        record.num_pins += 1
        record.num_waiting -= 1
        self.num_pins += 1
        self.device.use(digest)
        self.host.use(digest)
        return record.slot

    def release(self, digest: str, *, will_return: bool = False) -> None:
        """Unpin for one running sequence; with `will_return` (a preemption) it waits again."""
        record = self._records[digest]
        record.num_pins -= 1
        record.num_waiting += will_return
        self.num_pins -= 1
        self._drop_if_unused(record)

    def take_ops(self) -> list[AdapterOp]:
        """What the ranks have to do before the next forward pass, in order."""
        ops, self._ops = self._ops, []
        return ops

    def take_statuses(self) -> list[AdapterStatus]:
        """The latest of each version whose tier has changed since the last call, or whose load has failed."""
        statuses, self._statuses = self._statuses, {}
        return [*statuses.values()]

    @property
    def is_short_of_kept(self) -> bool:
        """Whether a version that is to be kept is not on the device."""
        return any(not self.is_ready(digest) for digest in self._kept)

    @property
    def has_ops(self) -> bool:
        """Whether the ranks have something to do."""
        return bool(self._ops)

    @property
    def num_loading(self) -> int:
        """Loads on their way, into host memory or onto the device."""
        return self._num_loading + self._num_entering

    @property
    def num_registered(self) -> int:
        """Versions known."""
        return len(self._records)

    def resident_ids(self) -> list[str]:
        """Names of the adapters in slots."""
        records = (self._records[digest] for digest in self.device.digests())
        return [record.spec.adapter_id for record in records if record.tier == "device"]

    def is_pinned(self, digest: str) -> bool:
        """Whether a running sequence uses the version."""
        return self._records[digest].num_pins > 0

    def check_integrity(self) -> None:
        """Assert that tiers, pools, slots and counts agree; for tests and idle moments."""
        records = self._records.values()
        taken = [record.slot for record in records if record.tier in ("entering", "device")]
        assert sorted(taken + self._free_slots) == list(range(len(taken) + len(self._free_slots))), "slots"
        assert all(record.slot == -1 for record in records if record.tier not in ("entering", "device"))
        assert set(self.device.digests()) == {d for d, r in self._records.items() if r.slot >= 0}
        assert set(self.host.digests()) == {d for d, r in self._records.items() if r.tier != "disk"}
        assert self.num_pins == sum(record.num_pins for record in records)
        assert all(record.tier == "device" for record in records if record.num_pins)
        assert self._num_loading == sum(record.tier == "loading" for record in records)
        assert self._num_entering == sum(record.tier == "entering" for record in records)

    def _start_host_load(self, record: AdapterRecord, nearness: Mapping[str, int], limit: int) -> bool:
        victims = self.host.victims(record.num_bytes, lambda digest: self._standing(digest, nearness, limit))
        if victims is None:
            return False
        for digest in victims:
            self._leave_host(self._records[digest])
        self.host.add(record.spec.digest, record.num_bytes)
        record.tier = "loading"
        self._num_loading += 1
        spec = record.spec
        self._ops.append(AdapterOp(kind="host_load", digest=spec.digest, path=spec.path, merge=spec.merge))
        return True

    def _start_device_load(self, record: AdapterRecord, nearness: Mapping[str, int], limit: int) -> bool:
        victims = self.device.victims(
            record.device_bytes,
            lambda digest: self._standing(digest, nearness, limit),
            at_least=0 if self._free_slots else 1,
        )
        if victims is None:
            return False
        for digest in victims:
            self._leave_slot(self._records[digest])
        self.device.add(record.spec.digest, record.device_bytes)
        record.slot, record.tier = self._free_slots.pop(), "entering"
        self._num_entering += 1
        self._ops.append(AdapterOp(kind="device_load", digest=record.spec.digest))
        return True

    def _standing(self, digest: str, nearness: Mapping[str, int], limit: int) -> int | None:
        """Who may be evicted, and in which order: see TierPool.victims. Below `limit` the need is not near enough."""
        record = self._records[digest]
        if record.num_pins or record.tier in ("loading", "entering"):
            return None
        need = nearness.get(digest, 0)
        if record.is_kept:
            return limit if limit > 1 else None
        return need if need < limit else None

    def _finish_host_load(self, record: AdapterRecord, load: FinishedLoad) -> None:
        self._num_loading -= 1
        # What the header has promised may be more in the type of the computation, and in whole frames.
        if load.error is None and load.device_bytes is not None:
            record.device_bytes = load.device_bytes
        reason = load.error or self._too_large(load.num_bytes, record.device_bytes)
        if reason is not None:
            if load.error is None:
                self._ops.append(AdapterOp(kind="host_evict", digest=load.digest))
            self.host.remove(load.digest)
            record.tier = "disk"
            self._fail(record, reason)
            return
        record.tier = "host"
        record.num_bytes = load.num_bytes
        self.host.resize(load.digest, load.num_bytes)
        self._report(record)
        self._counts.host_loads += 1
        self._counts.host_load_s.append(load.seconds)

    def _finish_device_load(self, record: AdapterRecord, load: FinishedLoad) -> None:
        self._num_entering -= 1
        if load.error is not None:
            self.device.remove(load.digest)
            self._free_slots.append(record.slot)
            record.slot, record.tier = -1, "host"
            self._fail(record, load.error)
            return
        record.tier = "device"
        self._report(record)
        self._ops.append(AdapterOp(kind="slot_load", digest=load.digest, slot=record.slot))
        self._counts.device_loads += 1
        self._counts.device_load_s.append(load.seconds)

    def _fail(self, record: AdapterRecord, reason: str) -> None:
        digest = record.spec.digest
        self._failed.append((digest, reason))
        self._counts.failed_loads += 1
        self.keep(digest, False)  # or it would be tried again and again
        self._report(record, reason)

    def _report(self, record: AdapterRecord, error: str | None = None) -> None:
        spec = record.spec
        tier = _REPORTED[record.tier]
        self._statuses[spec.digest] = AdapterStatus(
            adapter_id=spec.adapter_id,
            digest=spec.digest,
            tier=tier,
            num_bytes=record.num_bytes if tier != "disk" else 0,
            device_bytes=record.device_bytes if tier == "device" else 0,
            error=error,
        )

    def _too_large(self, host_bytes: int, device_bytes: int) -> str | None:
        for pool, num_bytes, flag in (
            (self.host, host_bytes, "--adapter-host-memory"),
            (self.device, device_bytes, "--adapter-device-memory"),
        ):
            if num_bytes > pool.budget_bytes:
                return (
                    f"it takes {num_bytes / MIB:.1f} MiB, more than the {pool.budget_bytes / MIB:.1f} MiB "
                    f"that all adapters together may take: raise {flag}"
                )
        return None

    def _leave_slot(self, record: AdapterRecord) -> None:
        digest = record.spec.digest
        self._ops.append(AdapterOp(kind="slot_clear", digest=digest, slot=record.slot))
        self.device.remove(digest)
        self._free_slots.append(record.slot)
        record.slot, record.tier = -1, "host"
        self._report(record)
        self._counts.device_evictions += 1

    def _leave_host(self, record: AdapterRecord) -> None:
        if record.tier == "device":
            self._leave_slot(record)
        self._ops.append(AdapterOp(kind="host_evict", digest=record.spec.digest))
        self.host.remove(record.spec.digest)
        record.tier = "disk"
        self._report(record)
        self._counts.host_evictions += 1

    def _drop_if_unused(self, record: AdapterRecord) -> None:
        if not record.is_forgotten or record.num_pins or record.num_waiting or record.tier in ("loading", "entering"):
            return
        if record.tier != "disk":
            self._leave_host(record)
        spec = record.spec
        self._statuses[spec.digest] = AdapterStatus(adapter_id=spec.adapter_id, digest=spec.digest, tier="gone")
        self._kept.pop(spec.digest, None)
        del self._records[spec.digest]
