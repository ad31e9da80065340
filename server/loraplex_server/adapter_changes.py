"""`AdapterChanges`: what an operator does to adapters while the server runs, one change of a name at a time."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from weakref import WeakValueDictionary

import msgspec

from loraplex_models.sources import adapter_id_problem
from loraplex_server.adapter_fetcher import AdapterFetcher
from loraplex_server.adapter_intake import BroughtAdapter
from loraplex_server.adapter_location import AdapterLocation
from loraplex_server.adapter_origin import AdapterOrigin
from loraplex_server.adapter_registry import FIRST_VERSION, AdapterEntry, AdapterRegistry, AdapterVersion
from loraplex_server.adapter_state import AdapterState, KeptName, KeptVersion
from loraplex_server.errors import AdapterUnavailable, InvalidRequest, LoraplexError
from loraplex_server.messages import AdapterSpec

logger = logging.getLogger("loraplex.api")

MAX_SHARES = 16

# A content, the place it came from, and who may see it → where it can be had again.
OriginOf = Callable[[AdapterSpec, AdapterLocation | None, str | None], AdapterOrigin]


class NameTaken(InvalidRequest):
    """The name has an adapter already, and it was not to be replaced."""


class AdapterChanges:
    """Registers, replaces, splits and forgets names. A change that fails leaves everything as it was.

    With a `state` it is written down before it is made. Only the event loop's thread may use it.
    """

    def __init__(
        self,
        registry: AdapterRegistry,
        fetcher: AdapterFetcher,
        base_model_name: str,
        origin_of: OriginOf,
        state: AdapterState | None = None,
        names_of_start: frozenset[str] = frozenset(),
    ):
        self._origin_of = origin_of
        self._state = state
        self._names_of_start = names_of_start
        self._registry = registry
        self._fetcher = fetcher
        self._base_model_name = base_model_name
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    async def register(
        self,
        name: str,
        location: AdapterLocation,
        token: str | None = None,
        *,
        version: str | None = None,
        activate: bool = True,
        brings: bool = True,
        replaces: bool = True,
    ) -> AdapterEntry:
        """Make a name or a further version of it known; with `brings` its files are fetched and checked first.

        Without a version's name the new one takes the place of those that get requests; its files are always checked.
        Raises AdapterError, and InvalidRequest for what cannot be a name.
        """
        self.check_name(name, version)
        async with self._alone(name):
            if not replaces and self._registry.find(name) is not None:
                raise NameTaken(f"adapter '{name}' has already been loaded")
            new = AdapterVersion(version or "", location, origin=AdapterOrigin(location=location))
            if brings or self._registry.find(name) is not None:
                self._fetcher.forget_refusal(location)
                brought = await self._bring(name, location, token)
                new.spec = msgspec.structs.replace(brought.spec, adapter_id=name)
                new.origin = self._origin_of(brought.spec, location, brought.scope)
            return await self._enter(name, new, activate=activate)

    async def enter(self, name: str, new: AdapterVersion, *, activate: bool) -> AdapterEntry:
        """Make a checked content known under a name, as a further version or in the place of the ones it has.

        A version without a name takes the place of those that get requests, as in `register`. Raises AdapterError.
        """
        async with self._alone(name):
            return await self._enter(name, new, activate=activate)

    async def unregister(self, name: str) -> None:
        """Forget a name; what was admitted ends as it began. Raises AdapterNotFound, AdapterUnavailable."""
        async with self._alone(name):
            self.entry(name)
            # The start would name it again.
            await self._keep(name, KeptName(name=name) if name in self._names_of_start else None)
            self._registry.remove(name)

    async def remove_version(self, name: str, version: str) -> None:
        """Forget a version that gets no requests. Raises AdapterNotFound, InvalidRequest, AdapterUnavailable."""
        async with self._alone(name):
            entry = self.entry(name)
            if version not in entry.versions:
                raise self._registry.not_found(f"{name}@{version}")
            if version in entry.split:
                raise InvalidRequest(
                    f"version '{version}' of adapter '{name}' gets requests: send them to another one first"
                )
            others = [one for one in entry.versions.values() if one.version != version]
            await self._keep(name, self._kept(name, others, entry.split, self._registry.is_pinned(entry)))
            self._registry.remove_version(entry, version)

    async def split(self, name: str, shares: dict[str, float]) -> AdapterEntry:
        """Send a name's requests to versions of it by shares. Raises AdapterNotFound, InvalidRequest."""
        async with self._alone(name):
            entry = self.entry(name)
            if not 1 <= len(shares) <= MAX_SHARES:
                raise InvalidRequest(f"`split` must have from 1 to {MAX_SHARES} versions. Given: {len(shares)}")
            for version, share in shares.items():
                if version not in entry.versions:
                    raise self._registry.not_found(f"{name}@{version}")
                if not 0 < share <= 1e6:
                    raise InvalidRequest(f"`split` must have shares above 0. Given for '{version[:100]}': {share:g}")
            is_pinned = self._registry.is_pinned(entry)
            await self._keep(name, self._kept(name, entry.versions.values(), shares, is_pinned))
            self._registry.split(entry, dict(shares))
            return entry

    async def pin(self, name: str, is_pinned: bool) -> AdapterEntry:
        """Have what requests for a name get ready for the model, or no longer. Raises AdapterNotFound."""
        async with self._alone(name):
            entry = self.entry(name)
            await self._keep(name, self._kept(name, entry.versions.values(), entry.split, is_pinned))
            self._registry.pin(entry, is_pinned)
            return entry

    def check_name(self, name: str, version: str | None = None) -> None:
        """Refuse what cannot be the name of an adapter or of a version. Raises InvalidRequest."""
        for field, text in (("name", name), ("version", version)):
            problem = None if text is None else adapter_id_problem(text)
            if text is not None and "@" in text:
                problem = "must not contain '@'"
            if problem is not None:
                raise InvalidRequest(f"an adapter's {field} {problem}")
        if version is not None and "/" in version:
            raise InvalidRequest("an adapter's version must not contain '/'")
        if name == self._base_model_name:
            raise InvalidRequest(f"the name '{name}' conflicts with the served base model")

    async def _enter(self, name: str, new: AdapterVersion, *, activate: bool) -> AdapterEntry:
        found = self._registry.find(name)
        if found is None:
            new.version = new.version or FIRST_VERSION
            await self._keep(name, self._kept(name, [new], {new.version: 1.0}, is_pinned=False))
            return self._registry.add(name, new)
        entry = found[0]
        replaced = [version for version in entry.split if not new.version and activate]
        new.version = new.version or _next_version(entry)
        versions = entry.versions | {new.version: new}
        others = [one for one in versions.values() if one.version not in replaced]
        split = {new.version: 1.0} if activate else entry.split
        await self._keep(name, self._kept(name, others, split, self._registry.is_pinned(entry)))
        entry.error = None
        self._registry.set_version(entry, new, activate=activate)
        for version in replaced:
            self._registry.remove_version(entry, version)
        return entry

    def _kept(
        self, name: str, versions: Iterable[AdapterVersion], split: dict[str, float], is_pinned: bool
    ) -> KeptName:
        """What the next start has to know of a name."""
        kept = []
        for one in versions:
            origin = one.origin
            if origin is None and one.spec is not None:
                origin = self._origin_of(one.spec, one.location, None)
            elif origin is None:
                origin = AdapterOrigin(location=one.location)  # of the start's list, and not looked at yet
            kept.append(KeptVersion(version=one.version, origin=origin))
        return KeptName(name=name, versions=tuple(kept), split=dict(split), pinned=is_pinned)

    async def _keep(self, name: str, kept: KeptName | None) -> None:
        """Write down a change before it is made. Raises AdapterUnavailable; then it is not made."""
        if self._state is None:
            return
        try:
            await asyncio.to_thread(self._state.write, name, kept)
        except OSError as error:
            logger.error("adapter '%s': the change cannot be written down (--adapter-state): %s", name, error)
            raise AdapterUnavailable(
                f"adapter '{name}' is as it was: the server's disk refuses ({error.strerror or 'write'})"
            ) from None

    async def _bring(self, name: str, location: AdapterLocation, token: str | None) -> BroughtAdapter:
        try:
            return await self._fetcher.fetch(name, location, token)
        except LoraplexError as error:
            found = self._registry.find(name)
            if found is not None:
                # The list shows why the replacement failed; the old weights go on.
                found[0].error = str(error)
            raise

    def entry(self, name: str) -> AdapterEntry:
        """What a name stands for. Raises AdapterNotFound."""
        found = self._registry.find(name)
        if found is None or found[1] is not None:
            raise self._registry.not_found(name)
        return found[0]

    @asynccontextmanager
    async def _alone(self, name: str) -> AsyncIterator[None]:
        async with self._locks.setdefault(name, asyncio.Lock()):
            yield


def _next_version(entry: AdapterEntry) -> str:
    numbers = [int(version) for version in entry.versions if version.isascii() and version.isdecimal()]
    return str(max(numbers, default=0) + 1)
