"""`NamedMerges`: merges that have a name of their own, and keep the contents that their parts had."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from loraplex_server.adapter_changes import AdapterChanges, OriginOf
from loraplex_server.adapter_fetcher import AdapterFetcher
from loraplex_server.adapter_origin import AdapterOrigin, MergeOrigin
from loraplex_server.adapter_registry import AdapterEntry, AdapterRegistry, AdapterVersion
from loraplex_server.api.adapter_merges import AdapterMerges, merge_of_merges
from loraplex_server.api.found_adapter import FoundAdapter
from loraplex_server.api.job import NO_ACCESS, AdapterAccess
from loraplex_server.errors import AdapterError, InvalidRequest
from loraplex_server.wanted_merge import WantedMerge


class NamedMerges:
    """Only the event loop's thread may use it."""

    def __init__(
        self,
        registry: AdapterRegistry,
        changes: AdapterChanges,
        merges: AdapterMerges,
        fetcher: AdapterFetcher,
        origin_of: OriginOf,
    ):
        self._registry = registry
        self._changes = changes
        self._merges = merges
        self._fetcher = fetcher
        self._origin_of = origin_of

    async def register(
        self, name: str, wanted: WantedMerge, access: AdapterAccess, *, version: str | None, activate: bool
    ) -> AdapterEntry:
        """Serve several adapters, as they are now, as one under a name. Raises AdapterError, InvalidRequest."""
        self._changes.check_name(name, version)
        async with self._made(name, version or "", wanted, access) as new:
            return await self._changes.enter(name, new, activate=activate)

    async def bring(self, entry: AdapterEntry, version: AdapterVersion) -> None:
        """Have a merge ready that was known by what it is made of alone. Raises AdapterError, InvalidRequest.

        Where its parts have never been looked at, because it is of the start's list, they are taken as they are now.
        """
        origin = version.origin
        assert isinstance(origin, MergeOrigin)
        try:
            if not origin.parts:
                async with self._made(entry.name, version.version, origin.wanted, NO_ACCESS) as made:
                    assert made.spec is not None and made.origin is not None
                    self._registry.set_merge(entry, version, made.origin, made.spec, made.parts)
                return
            parts = [
                (await self._fetcher.fetch(part_name, part, None)).spec
                for part_name, part in zip(origin.wanted.ids, origin.parts, strict=True)
            ]
        except AdapterError as error:
            raise error.within(f"adapter '{entry.name}' is a merge") from None
        spec = await self._merges.spec(origin.wanted, parts, entry.name)
        self._registry.set_merge(entry, version, origin, spec, tuple(parts))

    @asynccontextmanager
    async def _made(
        self, name: str, version: str, wanted: WantedMerge, access: AdapterAccess
    ) -> AsyncIterator[AdapterVersion]:
        """The merge of what its parts are now, which are known to the engine until the block ends."""
        for adapter_id in wanted.ids:
            found = self._registry.find(adapter_id)
            if found is None:
                continue
            entry, named = found
            if named is None and len(entry.split) > 1:
                raise InvalidRequest(
                    f"requests for adapter '{adapter_id}' are split between its versions: say which one is meant, as in"
                    f" {adapter_id}@{next(iter(entry.split))}"
                )
            if entry.versions[named or next(iter(entry.split))].merge is not None:
                raise merge_of_merges(adapter_id)  # before it is made, which might never end
        async with self._merges.made(wanted, access, name) as made:
            origin = MergeOrigin(wanted=wanted, parts=tuple(self._part_origin(part) for part in made.parts))
            yield AdapterVersion(version, None, made.spec, origin, tuple(part.spec for part in made.parts))

    def _part_origin(self, part: FoundAdapter) -> AdapterOrigin:
        known = part.origin
        if isinstance(known, AdapterOrigin) and known.digest == part.spec.digest:
            return known
        return self._origin_of(part.spec, known.location if isinstance(known, AdapterOrigin) else None, part.scope)
