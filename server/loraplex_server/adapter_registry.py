"""`AdapterRegistry`: the adapters that requests may name, and their versions.

A name has one version or several, and a split says which of them a request gets. A version has a location, and once its
files were brought and checked, an `AdapterSpec`; with very many names most have none, and cost no more than their text.
"""

import difflib
import hashlib
import time
from bisect import bisect, insort
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from loraplex_models.sources import adapter_id_problem
from loraplex_server.adapter_contents import AdapterContents
from loraplex_server.adapter_location import AdapterLocation
from loraplex_server.adapter_origin import AdapterOrigin, MergeOrigin, Origin, uploads_of
from loraplex_server.adapter_state import KeptName
from loraplex_server.config import AdapterConfig
from loraplex_server.errors import AdapterNotFound, InvalidRequest
from loraplex_server.messages import AdapterSpec
from loraplex_server.wanted_merge import WantedMerge

MAX_NEAR_NAMES = 5
# Names are compared with so many others at most: a comparison takes 30 µs, and requests wait meanwhile.
MAX_COMPARED_NAMES = 200
FIRST_VERSION = "1"


@dataclass(slots=True, eq=False)
class UseCount:
    """Requests that were served with an adapter. `last`: seconds since 1970; 0 is never."""

    num_requests: int = 0
    last: float = 0.0

    def add(self) -> None:
        """Count one, now."""
        self.num_requests += 1
        self.last = time.time()


@dataclass(slots=True, eq=False)
class AdapterVersion:
    """One content under a name. `spec` is there once the files were brought and checked.

    A merge keeps the contents of its parts, `parts`, whatever their names stand for later. When files are needed again,
    `location` is looked at; without one `origin`, which says what content it must be. What the start has checked has
    neither.
    """

    version: str
    location: AdapterLocation | None
    spec: AdapterSpec | None = None
    origin: Origin | None = None
    parts: tuple[AdapterSpec, ...] = ()
    error: str | None = None  # why the last try to bring its files failed
    uses: UseCount = field(default_factory=UseCount)

    def contents(self) -> list[AdapterSpec]:
        """All that the engine must know for it."""
        return [] if self.spec is None else [self.spec, *self.parts]

    @property
    def merge(self) -> WantedMerge | None:
        """What it was merged of, if it was."""
        return self.origin.wanted if isinstance(self.origin, MergeOrigin) else None

    @property
    def place(self) -> AdapterLocation | None:
        """Where its files come from; None for uploads, merges and what the start has checked."""
        return self.location or (self.origin.location if isinstance(self.origin, AdapterOrigin) else None)

    @property
    def source(self) -> str:
        """The name of the kind of place that its content comes from."""
        known = self.spec or self.origin or self.location
        assert known is not None, "it was checked at the start, or has a place or an origin"
        return known.source

    @property
    def label(self) -> str:
        """Where it comes from, for operators."""
        if self.place is not None:
            return str(self.place)
        return self.source if self.merge is None else self.merge.name


@dataclass(slots=True, eq=False)
class AdapterEntry:
    """A name and what it stands for. `split`: the versions that requests get, and their shares."""

    name: str
    versions: dict[str, AdapterVersion]
    split: dict[str, float]
    error: str | None = None  # why the last try to replace it failed

    def choose(self, key: str) -> AdapterVersion:
        """The version that a request gets; the same key gets the same one while the shares are the same."""
        if len(self.split) == 1:
            return self.versions[next(iter(self.split))]
        drawn = hashlib.blake2b(f"{self.name}\n{key}".encode(), digest_size=8).digest()
        place = int.from_bytes(drawn) / 2**64 * sum(self.split.values())
        for version, share in self.split.items():
            place -= share
            if place < 0:
                return self.versions[version]
        return self.versions[version]


class AdapterRegistry:
    """Names and versions; an id that is not known is refused, the base never takes its place.

    Only the event loop's thread may use a registry.
    """

    def __init__(
        self,
        config: AdapterConfig,
        contents: AdapterContents,
        on_unneeded: Callable[[str], None] = lambda store_key: None,
    ):
        """`on_unneeded` hears of folders of uploads that no name has any more; the engine may still need them."""
        self._contents = contents
        self._on_unneeded = on_unneeded
        self._entries: dict[str, AdapterEntry] = {}
        self._sorted_names: list[str] = []
        self._pinned: dict[str, AdapterEntry] = {}
        self._uploads: Counter[str] = Counter()  # folders of the store, by how many versions have them in their origin
        for spec in config.sources:
            contents.start_with(spec)
            self._enter(_new_entry(spec.adapter_id, AdapterVersion(FIRST_VERSION, None, spec)))

    # What requests ask

    def find(self, adapter_id: str) -> tuple[AdapterEntry, str | None] | None:
        """The entry that an id names, and the version it asks for with `name@version`; None for an unknown name."""
        entry = self._entries.get(adapter_id)
        if entry is not None:
            return entry, None
        name, separator, version = adapter_id.rpartition("@")
        entry = self._entries.get(name) if separator else None
        return None if entry is None or version not in entry.versions else (entry, version)

    def resolve(self, adapter_id: str) -> AdapterEntry:
        """The entry of this id. Raises InvalidRequest for what cannot be an id, AdapterNotFound for others."""
        problem = adapter_id_problem(adapter_id)
        if problem is not None:
            raise InvalidRequest(f"`adapter_id` {problem}")
        found = self.find(adapter_id)
        if found is None:
            raise self.not_found(adapter_id)
        return found[0]

    def not_found(self, adapter_id: str, reason: str = "") -> AdapterNotFound:
        """The refusal of an unknown id, with near names or the versions there are."""
        name, _, version = adapter_id.rpartition("@")
        entry = self._entries.get(name)
        if entry is not None:
            versions = ", ".join(list(entry.versions)[:MAX_NEAR_NAMES])
            return AdapterNotFound(f"adapter '{name}' has no version '{version}' on this server; it has {versions}")
        near = self._near_names(adapter_id)
        hint = f"; near names: {', '.join(near)}" if near else ""
        return AdapterNotFound(f"adapter '{adapter_id}' is not known to this server{reason}{hint}")

    # What changes

    def add(self, name: str, version: AdapterVersion) -> AdapterEntry:
        """Make a name known; it must not be."""
        self._acquire(version)
        return self._enter(_new_entry(name, version))

    def set_version(self, entry: AdapterEntry, new: AdapterVersion, *, activate: bool) -> None:
        """Add a version to a name, or put it in the place of the one of the same name; all at once.

        With `activate` every later request gets it. What was admitted before ends on the old weights.
        """
        old = entry.versions.get(new.version)
        self._acquire(new)
        entry.versions[new.version] = new
        if activate:
            entry.split = {new.version: 1.0}
        self._refresh_kept()
        if old is not None:
            self._release(old)

    def split(self, entry: AdapterEntry, shares: dict[str, float]) -> None:
        """Send a name's requests to versions that it has, by shares."""
        entry.split = shares
        self._refresh_kept()

    def pin(self, entry: AdapterEntry, is_pinned: bool) -> None:
        """Have the versions that get requests ready for the model, whoever waits for others; or no longer."""
        if is_pinned:
            self._pinned[entry.name] = entry
        else:
            self._pinned.pop(entry.name, None)
        self._refresh_kept()

    def is_pinned(self, entry: AdapterEntry) -> bool:
        """Whether a name is pinned."""
        return entry.name in self._pinned

    def set_spec(self, entry: AdapterEntry, version: AdapterVersion, spec: AdapterSpec) -> None:
        """A version's files were brought and checked. Raises AdapterNotFound where the name has it no more."""
        self._set(entry, version, version.origin, spec, ())

    def set_merge(
        self,
        entry: AdapterEntry,
        version: AdapterVersion,
        origin: Origin,
        spec: AdapterSpec,
        parts: tuple[AdapterSpec, ...],
    ) -> None:
        """The parts of a merge were brought and checked. Raises AdapterNotFound where the name has it no more."""
        self._set(entry, version, origin, spec, parts)

    def _set(
        self,
        entry: AdapterEntry,
        version: AdapterVersion,
        origin: Origin | None,
        spec: AdapterSpec,
        parts: tuple[AdapterSpec, ...],
    ) -> None:
        if entry.versions.get(version.version) is not version or self._entries.get(entry.name) is not entry:
            raise self.not_found(f"{entry.name}@{version.version}")
        new = AdapterVersion(version.version, version.location, spec, origin, parts)
        old = AdapterVersion(version.version, version.location, version.spec, version.origin, version.parts)
        self._acquire(new)
        version.spec, version.origin, version.parts, version.error = spec, origin, parts, None
        self._refresh_kept()
        self._release(old)

    def lost(self, digest: str, error: str) -> None:
        """The engine could not load a content: versions that can be brought again are, by the next request."""
        for entry in self._entries.values():
            for version in entry.versions.values():
                if version.spec is None or version.spec.digest != digest:
                    continue
                version.error = error
                if version.location is not None or version.origin is not None:
                    lost = version.contents()
                    version.spec, version.parts = None, ()
                    self._refresh_kept()
                    for released in lost:
                        self._contents.release(released)

    def remove_version(self, entry: AdapterEntry, version: str) -> None:
        """Forget a version that no split names."""
        self._release(entry.versions.pop(version))

    def remove(self, name: str) -> None:
        """Forget a name with all versions; what was admitted ends as it began."""
        entry = self._entries.pop(name)
        self._pinned.pop(name, None)
        self._refresh_kept()
        del self._sorted_names[bisect(self._sorted_names, name) - 1]
        for version in entry.versions.values():
            self._release(version)

    def restore(self, kept: KeptName) -> None:
        """Have a name stand for what it stood for when the server ended, whatever the start says of it.

        Nothing is looked at before it is needed.
        """
        if kept.name in self._entries:
            self.remove(kept.name)
        if not kept.versions:
            return
        versions = {}
        for one in kept.versions:
            # What nobody had looked at need not be what it was.
            origin = one.origin
            location = origin.location if isinstance(origin, AdapterOrigin) and origin.digest is None else None
            versions[one.version] = AdapterVersion(one.version, location, origin=origin)
            self._acquire(versions[one.version])
        entry = self._enter(AdapterEntry(kept.name, versions, dict(kept.split)))
        if kept.pinned:
            self._pinned[entry.name] = entry

    # What the server shows

    def is_known(self, name: str) -> bool:
        """Whether it is the name of an adapter."""
        return name in self._entries

    def pinned(self) -> list[AdapterEntry]:
        """The names that are to be ready."""
        return [*self._pinned.values()]

    def needs_upload(self, store_key: str) -> bool:
        """Whether a folder of the store holds what a name was given with an upload."""
        return store_key in self._uploads

    def entries(self) -> list[AdapterEntry]:
        """All names, in the order they came."""
        return [*self._entries.values()]

    def _acquire(self, version: AdapterVersion) -> None:
        self._uploads.update(uploads_of(version.origin))
        for spec in version.contents():
            self._contents.acquire(spec)

    def _release(self, version: AdapterVersion) -> None:
        for upload in uploads_of(version.origin):
            self._uploads[upload] -= 1
            if not self._uploads[upload]:
                del self._uploads[upload]
                self._on_unneeded(upload)
        for spec in version.contents():
            self._contents.release(spec)

    def _enter(self, entry: AdapterEntry) -> AdapterEntry:
        self._entries[entry.name] = entry
        insort(self._sorted_names, entry.name)
        return entry

    def _refresh_kept(self) -> None:
        specs = (entry.versions[name].spec for entry in self._pinned.values() for name in entry.split)
        self._contents.keep({spec.digest for spec in specs if spec is not None})

    def _near_names(self, adapter_id: str) -> list[str]:
        # Of many names only those that begin alike are compared.
        start = max(0, bisect(self._sorted_names, adapter_id) - MAX_COMPARED_NAMES // 2)
        candidates = self._sorted_names[start : start + MAX_COMPARED_NAMES]
        return difflib.get_close_matches(adapter_id, candidates, n=MAX_NEAR_NAMES)


def _new_entry(name: str, version: AdapterVersion) -> AdapterEntry:
    return AdapterEntry(name, {version.version: version}, {version.version: 1.0})
