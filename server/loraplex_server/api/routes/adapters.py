"""GET, POST, PUT and DELETE of /adapters and /adapters/{name}: what is served, and changes of it."""

from itertools import zip_longest

import msgspec
from msgspec import UNSET
from starlette.datastructures import QueryParams
from starlette.requests import Request
from starlette.responses import Response

from loraplex_server.adapter_location import AdapterLocation, parse_location, parse_source, trusted
from loraplex_server.adapter_origin import AdapterOrigin, MergeOrigin
from loraplex_server.adapter_registry import AdapterEntry, AdapterVersion
from loraplex_server.adapter_store import MIB
from loraplex_server.api.adapter_finder import AdapterFinder, DynamicAdapter
from loraplex_server.api.admin import is_admin, require_admin
from loraplex_server.api.body import read_body
from loraplex_server.api.job import AdapterAccess
from loraplex_server.api.schemas.adapters import (
    AdapterInfo,
    AdapterList,
    ChangeBody,
    MergeInfo,
    PartInfo,
    RegisterBody,
    VersionInfo,
)
from loraplex_server.api.state import ApiState
from loraplex_server.api.upload import is_upload, receive_files
from loraplex_server.errors import InvalidRequest


async def list_adapters(request: Request) -> Response:
    """Every name, then what came because requests named it; private ones are shown to operators only."""
    finder = _finder(request)
    sees_all = is_admin(request)
    dynamic = [one for one in finder.dynamic() if sees_all or one.found.scope is None]
    return _json(
        AdapterList(
            adapters=[
                *(_named(finder, entry) for entry in finder.registry.entries()),
                *(_fetched(finder, one) for one in dynamic),
            ]
        )
    )


async def get_adapter(request: Request) -> Response:
    """One adapter by its name."""
    finder, name = _finder(request), request.path_params["name"]
    found = finder.registry.find(name)
    if found is not None:
        return _json(_named(finder, found[0]))
    sees_all = is_admin(request)
    for one in finder.dynamic():
        if name in (one.name, finder.place_of(one.location)) and (sees_all or one.found.scope is None):
            return _json(_fetched(finder, one))
    finder.registry.resolve(name)  # refuses what cannot be a name
    raise finder.registry.not_found(name)


async def register(request: Request) -> Response:
    """POST /adapters: a name, and where its files are to be had."""
    require_admin(request)
    body = await read_body(request, RegisterBody)
    return await _register(request, body)


async def change(request: Request) -> Response:
    """PUT /adapters/{name}: the files of a new version, or what requests for the name get."""
    require_admin(request)
    if is_upload(request):
        return await _upload(request)
    finder, name = _finder(request), request.path_params["name"]
    body = await read_body(request, ChangeBody)
    entry = finder.changes.entry(name)
    if body.split is not None and body.active is not None:
        raise InvalidRequest("`split` and `active` must not both be set")
    if body.split is not None:
        entry = await finder.changes.split(name, body.split)
    if body.active is not None:
        entry = await finder.changes.split(name, {body.active: 1.0})
    if body.pinned is not None:
        entry = await finder.changes.pin(name, body.pinned)
    return _json(_named(finder, entry))


async def delete(request: Request) -> Response:
    """DELETE /adapters/{name} or /adapters/{name}@{version}: what was admitted ends as it began."""
    require_admin(request)
    finder, name = _finder(request), request.path_params["name"]
    found = finder.registry.find(name)
    if found is not None and found[1] is not None:
        await finder.changes.remove_version(found[0].name, found[1])
    elif found is not None or not finder.forget_dynamic(name):
        await finder.changes.unregister(name)
    return Response(status_code=204)


async def _register(request: Request, body: RegisterBody) -> Response:
    finder = _finder(request)
    body.check()
    await request.app.state.api.serving()
    is_active = body.activate is not False
    if body.merged_adapters is not None:
        wanted, access = body.merged_adapters.wanted(), AdapterAccess(source=body.source, token=body.api_token)
        entry = await finder.named_merges.register(body.name, wanted, access, version=body.version, activate=is_active)
    else:
        entry = await finder.changes.register(
            body.name,
            _location(finder, body),
            body.api_token,
            version=body.version,
            activate=is_active,
            brings=body.preload is not False,
        )
    if body.pin is not None:
        entry = await finder.changes.pin(entry.name, body.pin)
    return _json(_named(finder, entry))


async def _upload(request: Request) -> Response:
    state: ApiState = request.app.state.api
    await state.serving()
    max_bytes = state.config.adapter_sources.max_adapter_mb * MIB
    query = request.query_params
    announced = request.headers.get("content-length", "")
    entry = await state.adapters.upload(
        request.path_params["name"],
        lambda folder: receive_files(request, folder, max_bytes),
        min(int(announced), max_bytes) if announced.isdecimal() else 0,
        version=query.get("version"),
        activate=_switch(query, "activate", default=True),
    )
    if "pin" in query:
        entry = await state.adapters.changes.pin(entry.name, _switch(query, "pin", default=False))
    return _json(_named(state.adapters, entry))


def _switch(query: QueryParams, name: str, *, default: bool) -> bool:
    text = query.get(name, str(default)).lower()
    if text not in ("true", "false"):
        raise InvalidRequest(f"`{name}` must be true or false. Given: {text[:40]}")
    return text == "true"


def _location(finder: AdapterFinder, body: RegisterBody) -> AdapterLocation:
    text = f"{body.id}@{body.revision}" if body.revision else body.id or ""
    return finder.location_of(text) if body.source is None else trusted(parse_location(parse_source(body.source), text))


def _finder(request: Request) -> AdapterFinder:
    state: ApiState = request.app.state.api
    return state.adapters


def _named(finder: AdapterFinder, entry: AdapterEntry) -> AdapterInfo:
    total = sum(entry.split.values())
    return AdapterInfo(
        name=entry.name,
        pinned=finder.registry.is_pinned(entry),
        dynamic=False,
        last_used=max(version.uses.last for version in entry.versions.values()) or None,
        error=entry.error,
        versions=[
            _version(finder, version, entry.split.get(version.version, 0.0) / total)
            for version in entry.versions.values()
        ],
    )


def _fetched(finder: AdapterFinder, one: DynamicAdapter) -> AdapterInfo:
    version = AdapterVersion("1", one.location, one.found.spec, uses=one.found.uses)
    return AdapterInfo(
        name=finder.place_of(one.location),
        pinned=False,
        dynamic=True,
        last_used=one.found.uses.last or None,
        error=None,
        versions=[_version(finder, version, 1.0)],
    )


def _version(finder: AdapterFinder, version: AdapterVersion, share: float) -> VersionInfo:
    spec, location = version.spec, version.place
    status = finder.status_of(spec) if spec is not None else None
    # What was restored is known by its record before it is looked at.
    known = spec or (version.origin if isinstance(version.origin, AdapterOrigin) else None)
    return VersionInfo(
        version=version.version,
        share=share,
        source=version.source,
        id=finder.place_of(location) if location is not None else version.label,
        revision=known.revision if known is not None else None,
        digest=known.digest if known is not None else None,
        rank=spec.rank if spec is not None else None,
        num_bytes=spec.num_bytes if spec is not None else None,
        tier=status.tier if status is not None else None,
        host_bytes=status.num_bytes if status is not None else 0,
        device_bytes=status.device_bytes if status is not None else 0,
        num_requests=version.uses.num_requests,
        error=version.error,
        merge=_merge(version.origin) if isinstance(version.origin, MergeOrigin) else UNSET,
    )


def _merge(origin: MergeOrigin) -> MergeInfo:
    merge = origin.wanted
    return MergeInfo(
        parts=[
            PartInfo(id=adapter_id, weight=weight, digest=None if part is None else part.digest)
            for adapter_id, weight, part in zip_longest(merge.ids, merge.weights, origin.parts)
        ],
        merge_strategy=merge.strategy,
        density=merge.density,
        majority_sign_method=merge.majority_sign,
    )


def _json(content: msgspec.Struct) -> Response:
    return Response(msgspec.json.encode(content), media_type="application/json")
