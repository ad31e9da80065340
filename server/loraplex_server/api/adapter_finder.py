"""`AdapterFinder`: from what a request calls an adapter to a content that the engine knows, fetched if need be."""

import asyncio
import contextlib
import logging
import os
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec

from loraplex_models.adapter_roots import folder_below
from loraplex_models.sources import adapter_id_problem, read_adapter_list
from loraplex_server.adapter_changes import AdapterChanges
from loraplex_server.adapter_contents import AdapterContents, AdapterMessage
from loraplex_server.adapter_fetcher import AdapterFetcher
from loraplex_server.adapter_intake import UPLOAD_PREFIX, AdapterIntake
from loraplex_server.adapter_location import AdapterLocation, Source, from_item, parse_location, parse_source, trusted
from loraplex_server.adapter_origin import UPLOAD, AdapterOrigin, MergeOrigin
from loraplex_server.adapter_registry import (
    FIRST_VERSION,
    AdapterEntry,
    AdapterRegistry,
    AdapterVersion,
    UseCount,
)
from loraplex_server.adapter_state import AdapterState
from loraplex_server.adapter_store import MIB, AdapterStore
from loraplex_server.api.adapter_merges import AdapterMerges
from loraplex_server.api.found_adapter import FoundAdapter
from loraplex_server.api.job import AdapterAccess
from loraplex_server.api.named_merges import NamedMerges
from loraplex_server.api.schemas.listed_merges import listed_merges
from loraplex_server.config import AdapterSourceConfig, ServeConfig
from loraplex_server.errors import AdapterUnavailable, InvalidRequest, LoraplexError, Overloaded
from loraplex_server.messages import AdapterSpec, AdapterStatus

logger = logging.getLogger("loraplex.api")

# Adapters that were fetched for a request and are remembered; the longest unused one is forgotten for the next.
MAX_DYNAMIC_ADAPTERS = 10_000
MAX_UPLOADS = 4
# How long a fetching thread waits for the event loop, which may be about to end.
LET_GO_WAIT_S = 5


@dataclass(slots=True, eq=False)
class DynamicAdapter:
    """An adapter that came because a request named it."""

    name: str
    location: AdapterLocation
    found: FoundAdapter


class AdapterFinder:
    """Names first, then what was fetched before, then the sources. Only the event loop's thread may use it.

    What a caller's own token was needed for is kept under that token and is not there for others: they are answered as
    if it did not exist, by the source itself.
    """

    def __init__(
        self,
        config: AdapterSourceConfig,
        registry: AdapterRegistry,
        contents: AdapterContents,
        intake: AdapterIntake,
        fetcher: AdapterFetcher,
        *,
        base_model_name: str,
        max_waiting: int,
        state: AdapterState | None = None,
        names_of_start: frozenset[str] = frozenset(),
    ):
        """`state` keeps changes of names; the registry has what it had already."""
        self.registry = registry
        self.contents = contents
        self.changes = AdapterChanges(registry, fetcher, base_model_name, intake.origin_of, state, names_of_start)
        self.merges = AdapterMerges(self.held, contents, intake.model_config)
        self.named_merges = NamedMerges(registry, self.changes, self.merges, fetcher, intake.origin_of)
        self._state = state
        self._fetcher = fetcher
        self._config = config
        self._intake = intake
        self._max_waiting = max_waiting
        self._num_waiting = 0
        self._num_uploads = 0
        self._bringing: asyncio.Task[None] | None = None
        self._statuses: dict[str, AdapterStatus] = {}
        self._dynamic: OrderedDict[tuple[AdapterLocation, str | None], DynamicAdapter] = OrderedDict()

    def check_name(self, adapter_id: str, access: AdapterAccess) -> None:
        """Refuse what is not known and could not be fetched either. Raises AdapterNotFound, InvalidRequest."""
        if self.registry.find(adapter_id) is None:
            self._location(adapter_id, access)

    def is_here(self, adapter_id: str, access: AdapterAccess) -> bool:
        """Whether a request for it would be served without fetching anything."""
        try:
            return self._here(adapter_id, access) is not None
        except LoraplexError:
            return False

    @asynccontextmanager
    async def held(self, adapter_id: str, access: AdapterAccess) -> AsyncIterator[FoundAdapter]:
        """The adapter, known to the engine until the block ends. Raises AdapterError, InvalidRequest, Overloaded."""
        found = self._here(adapter_id, access)
        if found is None:
            if self._num_waiting >= self._max_waiting:
                raise Overloaded(f"{self._max_waiting} requests wait for adapters that are being fetched already")
            self._num_waiting += 1
            try:
                found = await self._fetch(adapter_id, access)
            finally:
                self._num_waiting -= 1
        found.uses.add()
        with self.contents.holding(found.spec):
            yield found

    async def bring(self, entry: AdapterEntry, version: AdapterVersion) -> AdapterSpec:
        """The spec of a registered version, fetched if it is not here. Raises AdapterError."""
        try:
            if version.merge is not None:
                await self.named_merges.bring(entry, version)
            else:
                wanted = version.location or version.origin
                assert isinstance(wanted, AdapterLocation | AdapterOrigin), "it has a place to fetch its files from"
                brought = await self._fetcher.fetch(entry.name, wanted, None)
                self.registry.set_spec(entry, version, msgspec.structs.replace(brought.spec, adapter_id=entry.name))
        except LoraplexError as error:
            version.error = str(error)
            raise
        assert version.spec is not None
        return version.spec

    async def bring_pinned(self) -> None:
        """Bring what is pinned, after a start that has looked at nothing; what fails says so when it is asked for."""
        for entry in self.registry.pinned():
            for name in entry.split:
                if name in entry.versions and entry.versions[name].spec is None:
                    with contextlib.suppress(LoraplexError):
                        await self.bring(entry, entry.versions[name])

    def location_of(self, text: str) -> AdapterLocation:
        """What an operator means by a path or an id: a folder below the roots, or else a hub id."""
        if "/" not in text or text.startswith(("/", ".", "~")) or folder_below(self._config.adapter_root, text):
            return parse_location("local", text)
        return trusted(parse_location("hub", text))

    async def upload(
        self,
        name: str,
        receive: Callable[[Path], Awaitable[None]],
        num_bytes: int,
        *,
        version: str | None,
        activate: bool,
    ) -> AdapterEntry:
        """Take in the files that `receive` writes into a folder, and serve them under a name.

        Nothing is left of what is refused. Raises AdapterError, InvalidRequest, Overloaded, and what `receive` raises.
        """
        self.changes.check_name(name, version)
        if self._num_uploads == MAX_UPLOADS:
            raise Overloaded(f"{MAX_UPLOADS} adapters are being uploaded already")
        self._num_uploads += 1
        try:
            staging = await asyncio.to_thread(self._intake.begin_upload, name, num_bytes)
            try:
                with self._intake.disk_errors(name):
                    await receive(staging)
                spec = await asyncio.to_thread(self._intake.end_upload, name, staging)
            finally:
                await asyncio.to_thread(self._intake.drop_upload, staging)
        finally:
            self._num_uploads -= 1
        new = AdapterVersion(version or "", None, spec, self._intake.origin_of(spec, None))
        try:
            return await self.changes.enter(name, new, activate=activate)
        except LoraplexError:
            await asyncio.to_thread(self._intake.discard, Path(spec.path).name)
            raise

    def observe(self, status: AdapterStatus) -> None:
        """Take in what the engine says of a content: where it is now, or why it could not be loaded."""
        if status.tier == "gone" or not self.contents.num_uses(status.digest):
            self._statuses.pop(status.digest, None)
        else:
            self._statuses[status.digest] = status
        if status.error is not None:
            # Its files are not what was checked: the next request looks again.
            for key in [key for key, one in self._dynamic.items() if one.found.spec.digest == status.digest]:
                self._drop(key)
            self.registry.lost(status.digest, status.error)

    def status_of(self, spec: AdapterSpec) -> AdapterStatus:
        """Where a content is now, and what it takes there."""
        return self._statuses.get(spec.digest) or AdapterStatus(
            adapter_id=spec.adapter_id, digest=spec.digest, tier="disk"
        )

    def meet_new_engine(self) -> list[AdapterMessage]:
        """The engine was started again and knows nothing: what it has to be told first."""
        self._statuses.clear()
        return self.contents.messages_for_new_engine()

    def dynamic(self) -> list[DynamicAdapter]:
        """What was fetched for requests, the longest unused first."""
        return [*self._dynamic.values()]

    def place_of(self, location: AdapterLocation) -> str:
        """A location as everybody may see it: no folder of this machine above the roots."""
        if location.source != "local":
            return str(location)
        if location.by_operator:
            return os.path.basename(location.place.rstrip("/"))
        place = location.place
        roots = (root.rstrip("/") + "/" for root in self._config.adapter_root)
        return next((place.removeprefix(root) for root in roots if place.startswith(root)), place)

    def forget_dynamic(self, adapter_id: str) -> bool:
        """Forget what was fetched under this id, for everybody; whether there was anything."""
        keys = [key for key, one in self._dynamic.items() if adapter_id in (one.name, self.place_of(one.location))]
        for key in keys:
            self._drop(key)
        return bool(keys)

    def let_go(self, store_key: str) -> bool:
        """Forget the fetched adapter whose files lie under this key, unless somebody needs it; whether they may go."""
        for key, one in self._dynamic.items():
            if one.found.spec.path.endswith(store_key) and self.contents.num_uses(one.found.spec.digest) == 1:
                self._drop(key)
                break
        return not (self.registry.needs_upload(store_key) or self.contents.reads_from(store_key))

    def close(self) -> None:
        """End what is on its way."""
        self._fetcher.close()
        if self._bringing is not None:
            self._bringing.cancel()
        if self._state is not None:
            self._state.close()

    def bring_in_the_background(self) -> None:
        """Begin with what is pinned and not here."""
        self._bringing = asyncio.create_task(self.bring_pinned())

    def _here(self, adapter_id: str, access: AdapterAccess) -> FoundAdapter | None:
        """What is known already, or None when it could be fetched. Raises when it could not."""
        named = self.registry.find(adapter_id)
        if named is not None:
            entry, version_name = named
            version = entry.choose(access.split_key) if version_name is None else entry.versions[version_name]
            if version.spec is None:
                return None
            return FoundAdapter(version.spec, None, version.uses, version.origin)
        location = self._location(adapter_id, access)
        for scope in {None, self._intake.scope_of(access.token)}:
            one = self._dynamic.get((location, scope))
            if one is not None:
                self._dynamic.move_to_end((location, scope))
                return one.found
        return None

    def _location(self, adapter_id: str, access: AdapterAccess) -> AdapterLocation:
        if self._state is not None:
            for name in {adapter_id, adapter_id.rpartition("@")[0] or adapter_id}:
                if (problem := self._state.problem_of(name)) is not None and not self.registry.is_known(name):
                    raise AdapterUnavailable(problem)
        if not self._config.dynamic_adapters:
            problem = adapter_id_problem(adapter_id)
            if problem is not None:
                raise InvalidRequest(f"`adapter_id` {problem}")
            raise self.registry.not_found(adapter_id)
        source = self._source(adapter_id, access)
        name, _, version = adapter_id.rpartition("@")
        if source != "hub" and version and self.registry.find(name) is not None:
            raise self.registry.not_found(adapter_id)
        return parse_location(source, adapter_id)

    def _source(self, adapter_id: str, access: AdapterAccess) -> Source:
        if access.source:
            return parse_source(access.source)
        if self._config.adapter_root and "/" not in adapter_id:
            return "local"  # no hub id, but it may be a folder
        return parse_source(self._config.default_adapter_source)

    async def _fetch(self, adapter_id: str, access: AdapterAccess) -> FoundAdapter:
        named = self.registry.find(adapter_id)
        if named is not None:
            entry, version_name = named
            version = entry.choose(access.split_key) if version_name is None else entry.versions[version_name]
            spec = await self.bring(entry, version)
            return FoundAdapter(spec, None, version.uses, version.origin)
        location = self._location(adapter_id, access)
        brought = await self._fetcher.fetch(adapter_id, location, access.token)
        key = (location, brought.scope)
        one = self._dynamic.get(key)
        if one is None:
            one = self._dynamic[key] = DynamicAdapter(
                adapter_id,
                location,
                FoundAdapter(brought.spec, brought.scope, UseCount(), AdapterOrigin(location=location)),
            )
            self.contents.acquire(brought.spec)
            while len(self._dynamic) > MAX_DYNAMIC_ADAPTERS:
                self._drop(next(iter(self._dynamic)))
        return one.found

    def _drop(self, key: tuple[AdapterLocation, str | None]) -> None:
        self.contents.release(self._dynamic.pop(key).found.spec)


def build_finder(config: ServeConfig, tell: Callable[[AdapterMessage], None]) -> AdapterFinder:
    """The finder of one server, with all it stands on; for a running event loop. Raises AdapterStateError."""
    sources = config.adapter_sources
    loop = asyncio.get_running_loop()

    def discard(key: str) -> None:
        if not registry.needs_upload(key) and not contents.reads_from(key):
            loop.run_in_executor(None, intake.discard, key)

    contents = AdapterContents(tell, lambda spec: discard(Path(spec.path).name) if spec.source == UPLOAD else None)
    registry = AdapterRegistry(config.engine.adapters, contents, discard)
    if sources.adapter_list is not None:
        items, lines = read_adapter_list(sources.adapter_list)
        for item in items:
            registry.add(item.adapter_id, AdapterVersion(FIRST_VERSION, from_item(item)))
        for name, wanted in listed_merges(lines):
            registry.add(name, AdapterVersion(FIRST_VERSION, None, origin=MergeOrigin(wanted=wanted, parts=())))
    names_of_start = frozenset(entry.name for entry in registry.entries())
    store = AdapterStore(
        Path(sources.adapter_cache), sources.adapter_cache_mb * MIB, is_durable=sources.adapter_state is not None
    )

    async def let_go(key: str) -> bool:
        return finder.let_go(key)

    intake = AdapterIntake(
        config, store, lambda key: asyncio.run_coroutine_threadsafe(let_go(key), loop).result(LET_GO_WAIT_S)
    )
    fetcher = AdapterFetcher(intake, max_fetches=sources.max_adapter_fetches, timeout_s=sources.adapter_fetch_timeout)
    state = None
    if sources.adapter_state is not None:
        state = AdapterState(Path(sources.adapter_state))
        _restore(state, registry)
    finder = AdapterFinder(
        sources,
        registry,
        contents,
        intake,
        fetcher,
        base_model_name=config.api.model_id,
        max_waiting=config.api.max_concurrent_requests,
        state=state,
        names_of_start=names_of_start,
    )
    if state is not None:
        # Uploads whose names were never written down: the server was killed in between.
        for key in store.keys_with(UPLOAD_PREFIX):
            discard(key)
        finder.bring_in_the_background()
    return finder


def _restore(state: AdapterState, registry: AdapterRegistry) -> None:
    """Have names stand for what they stood for when the server ended."""
    state.open()
    kept = state.load()
    for one in kept:
        registry.restore(one)
    logger.info("%d names of adapters are as they were", sum(bool(one.versions) for one in kept))
    for problem in state.problems():
        logger.error("names of adapters: %s; requests for them are refused until they are registered again", problem)
