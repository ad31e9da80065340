"""The waiting sequences and whose turn it is: a virtual token counter for each tenant.

A tenant is whatever the scheduler shares fairly between: an adapter, an API key, or what a header says. Its counter
grows with the tokens it is served (Sheng et al., «Fairness in Serving Large Language Models», 2024); the tenant with
the lowest counter is next. Beside the counters runs the virtual time of fair queueing (Parekh and Gallager, 1993): what
a tenant would have been served that always had its share. Who comes back after a pause is lifted to it, so that credit
is not hoarded; and since it moves on however many new tenants come, none is passed by ever newer ones.
"""

from collections.abc import Iterator

from loraplex_server.engine.sequence import Sequence

# What a token costs: a generated one reads all weights alone, those of a prompt share a pass.
PROMPT_TOKEN_COST = 1
OUTPUT_TOKEN_COST = 2
# So far ahead of the virtual time, in tokens, a tenant may be when it comes back: what it was served while nobody else
# needed it is not held against it for long.
MAX_LEAD = 2048
# Counters of tenants with nothing to do that are kept; the one idle for longest is forgotten first.
MAX_IDLE_TENANTS = 4096


class Lane:
    """The waiting sequences of one tenant with one adapter, oldest first; never empty while the queue has it."""

    __slots__ = ("digest", "last_start", "sequences", "tenant")

    def __init__(self, tenant: str, digest: str | None):
        self.tenant = tenant
        self.digest = digest
        self.sequences: dict[int, Sequence] = {}  # by order of arrival
        self.last_start = 0.0  # when one of its sequences left to run; the scheduler's clock

    @property
    def head(self) -> Sequence:
        """The sequence whose turn it is in this lane."""
        return next(iter(self.sequences.values()))

    def passed_over_s(self, now: float) -> float:
        """How long its head has waited without any of the lane being begun."""
        return now - max(self.head.waiting_since, self.last_start)


class FairQueue:
    """All waiting sequences by tenant and adapter, and what each tenant was served."""

    def __init__(self) -> None:
        self._lanes: dict[tuple[str, str | None], Lane] = {}
        self._served: dict[str, float] = {}  # idle tenants too, as far as remembered; those last served come last
        self._num_waiting: dict[str, int] = {}  # by tenant, never 0
        self._last_start: dict[str, float] = {}  # of the tenants that wait
        self._virtual_time = 0.0
        self._len = 0

    def __len__(self) -> int:
        return self._len

    def __iter__(self) -> Iterator[Sequence]:
        for lane in self._lanes.values():
            yield from lane.sequences.values()

    def lanes(self) -> list[Lane]:
        """One for each tenant and adapter that waits."""
        return list(self._lanes.values())

    def lanes_of(self, digest: str) -> list[Lane]:
        """Those that wait for one adapter."""
        return [lane for lane in self._lanes.values() if lane.digest == digest]

    def served(self, tenant: str) -> float:
        """The tenant's virtual token counter."""
        return self._served.get(tenant, 0.0)

    def charge(self, tenant: str, cost: float) -> None:
        """Count what a tenant was served."""
        self._served[tenant] = self._served.get(tenant, 0.0) + cost
        self._virtual_time += cost / (len(self._num_waiting) or 1)

    def add(self, sequence: Sequence) -> None:
        """Let a sequence wait behind the older ones of its lane."""
        tenant = sequence.tenant
        if tenant not in self._num_waiting:
            self._lift(tenant)
        self._num_waiting[tenant] = self._num_waiting.get(tenant, 0) + 1
        self._len += 1
        key = (tenant, sequence.request.adapter_digest)
        lane = self._lanes.get(key)
        if lane is None:
            lane = self._lanes[key] = Lane(*key)
        is_youngest = not lane.sequences or sequence.order > next(reversed(lane.sequences))
        lane.sequences[sequence.order] = sequence
        if not is_youngest:  # it has run before
            lane.sequences = dict(sorted(lane.sequences.items()))

    def passed_over_s(self, lane: Lane, now: float) -> float:
        """How long the lane's head has waited without any sequence of its tenant being begun."""
        return now - max(lane.head.waiting_since, self._last_start.get(lane.tenant, 0.0))

    def start(self, sequence: Sequence, now: float) -> None:
        """Take out a sequence that is begun."""
        self._lanes[sequence.tenant, sequence.request.adapter_digest].last_start = now
        self._last_start[sequence.tenant] = now
        self.remove(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Take a waiting sequence out."""
        tenant = sequence.tenant
        key = (tenant, sequence.request.adapter_digest)
        lane = self._lanes[key]
        del lane.sequences[sequence.order]
        self._len -= 1
        if not lane.sequences:
            del self._lanes[key]
        self._num_waiting[tenant] -= 1
        if not self._num_waiting[tenant]:
            del self._num_waiting[tenant]
            self._last_start.pop(tenant, None)

    def _lift(self, tenant: str) -> None:
        counter = self._served.pop(tenant, 0.0)
        # Taken out and put back, so that the tenants that came last stand last.
        self._served[tenant] = min(max(counter, self._virtual_time), self._virtual_time + MAX_LEAD)
        if len(self._served) > MAX_IDLE_TENANTS + len(self._num_waiting):
            idle = next(name for name in self._served if name not in self._num_waiting and name != tenant)
            del self._served[idle]
