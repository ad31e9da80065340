"""Who takes the bytes of one memory tier, and who leaves first when they run out."""

from collections.abc import Callable, KeysView
from dataclasses import dataclass


@dataclass(slots=True)
class _Entry:
    num_bytes: int
    uses: int
    priority: float


class TierPool:
    """A budget in bytes and the adapters that share it, by digest.

    Eviction is GreedyDual-Size-Frequency (Cherkasova, 1998): an entry's priority is the pool's age at its last use,
    plus its uses times what a reload costs, divided by its size. The age is the priority of whoever was evicted last:
    old popularity fades as others go. A reload costs its bytes and `load_overhead_bytes`, the bytes that could be
    moved in the time that any load takes, however small.
    """

    def __init__(self, budget_bytes: int, load_overhead_bytes: int):
        self.budget_bytes = budget_bytes
        self.used_bytes = 0
        self._load_overhead_bytes = load_overhead_bytes
        self._entries: dict[str, _Entry] = {}
        self._age = 0.0

    def __contains__(self, digest: str) -> bool:
        return digest in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    def digests(self) -> KeysView[str]:
        """Who is in the pool or on the way into it."""
        return self._entries.keys()

    def add(self, digest: str, num_bytes: int) -> None:
        """Take bytes for a newcomer; the caller has made room."""
        self._entries[digest] = entry = _Entry(num_bytes, 0, 0.0)
        self.used_bytes += num_bytes
        self._touch(entry)

    def resize(self, digest: str, num_bytes: int) -> None:
        """Correct the size that was expected when the bytes were taken."""
        entry = self._entries[digest]
        self.used_bytes += num_bytes - entry.num_bytes
        entry.num_bytes = num_bytes

    def use(self, digest: str) -> None:
        """Note one more use."""
        entry = self._entries[digest]
        entry.uses += 1
        self._touch(entry)

    def remove(self, digest: str) -> None:
        """Give an entry's bytes back."""
        entry = self._entries.pop(digest)
        self.used_bytes -= entry.num_bytes
        self._age = max(self._age, entry.priority)

    def victims(self, num_bytes: int, standing: Callable[[str], int | None], *, at_least: int = 0) -> list[str] | None:
        """Whom to evict so that `num_bytes` more fit; None when that cannot be done.

        `standing` says who may go: None for those that stay; those with lower numbers go first. `at_least` so many go,
        even if the bytes would do.
        """
        excess = self.used_bytes + num_bytes - self.budget_bytes
        if excess <= 0 and not at_least:
            return []
        candidates = [
            (rank, entry.priority, digest)
            for digest, entry in self._entries.items()
            if (rank := standing(digest)) is not None
        ]
        chosen: list[str] = []
        for _, _, digest in sorted(candidates):
            chosen.append(digest)
            excess -= self._entries[digest].num_bytes
            if excess <= 0 and len(chosen) >= at_least:
                return chosen
        return None

    def _touch(self, entry: _Entry) -> None:
        # An entry of no bytes costs as little as one of a single byte.
        size = max(entry.num_bytes, 1)
        entry.priority = self._age + max(entry.uses, 1) * (1 + self._load_overhead_bytes / size)
