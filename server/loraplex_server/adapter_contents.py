"""`AdapterContents`: which adapter contents somebody needs, and what the engine is told of that.

The engine hears of a digest when the first name or request needs it, and is told to forget it when the last one has let
go, so that a request which was admitted never loses its weights, whatever happens to its adapter's name.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from loraplex_server.messages import AdapterSpec, KeepAdapter, LoadAdapter, UnloadAdapter

AdapterMessage = LoadAdapter | KeepAdapter | UnloadAdapter


class AdapterContents:
    """Counts the uses of each digest. `tell` hands messages to the engine, in order; `on_unused` hears of the last use
    that has ended.
    """

    def __init__(
        self,
        tell: Callable[[AdapterMessage], None],
        on_unused: Callable[[AdapterSpec], None] = lambda spec: None,
    ):
        self._tell = tell
        self._on_unused = on_unused
        self._num_uses: dict[str, int] = {}
        self._specs: dict[str, AdapterSpec] = {}
        # The engine knows a content by the first place it was in; others of the same content may be let go with it.
        self._other_places: dict[str, dict[str, AdapterSpec]] = {}
        self._kept: set[str] = set()

    def start_with(self, spec: AdapterSpec) -> None:
        """Count a use of what the engine has from its own configuration."""
        self._num_uses[spec.digest] = self._num_uses.get(spec.digest, 0) + 1
        self._specs[spec.digest] = spec

    def acquire(self, spec: AdapterSpec) -> None:
        """Count one more use."""
        uses = self._num_uses.get(spec.digest, 0)
        self._num_uses[spec.digest] = uses + 1
        if uses == 0:
            self._specs[spec.digest] = spec
            self._tell(LoadAdapter(spec=spec))
        elif spec.path != self._specs[spec.digest].path:
            self._other_places.setdefault(spec.digest, {})[spec.path] = spec

    def release(self, spec: AdapterSpec) -> None:
        """Count one use less."""
        uses = self._num_uses[spec.digest] - 1
        if uses:
            self._num_uses[spec.digest] = uses
            return
        known = self._specs.pop(spec.digest)
        del self._num_uses[spec.digest]
        self._kept.discard(spec.digest)
        self._tell(UnloadAdapter(digest=spec.digest))
        for unused in (known, *self._other_places.pop(spec.digest, {}).values()):
            self._on_unused(unused)

    def keep(self, digests: set[str]) -> None:
        """Have these contents ready for the model, and no others."""
        for digest in self._kept ^ digests:
            self._tell(KeepAdapter(digest=digest, is_kept=digest in digests))
        self._kept = digests

    @contextmanager
    def holding(self, spec: AdapterSpec) -> Iterator[None]:
        """Count a use for as long as the block lasts."""
        self.acquire(spec)
        try:
            yield
        finally:
            self.release(spec)

    def num_uses(self, digest: str) -> int:
        """How many names and requests need this content."""
        return self._num_uses.get(digest, 0)

    def reads_from(self, folder: str) -> bool:
        """Whether files in a folder of this name belong to a content that is needed."""
        others = (spec for places in self._other_places.values() for spec in places.values())
        return any(spec.path.endswith(folder) for spec in (*self._specs.values(), *others))

    def messages_for_new_engine(self) -> list[AdapterMessage]:
        """All that an engine which knows nothing has to be told first, in order."""
        return [
            *(LoadAdapter(spec=spec) for spec in self._specs.values()),
            *(KeepAdapter(digest=digest, is_kept=True) for digest in self._kept),
        ]
