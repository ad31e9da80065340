"""GET /v1/models and /v1/models/{id}: the base model first, then the adapters."""

import msgspec
from msgspec import UNSET, UnsetType
from starlette.requests import Request
from starlette.responses import Response

from loraplex_server.adapter_registry import AdapterEntry
from loraplex_server.api.state import ApiState
from loraplex_server.errors import AdapterNotFound


class Model(msgspec.Struct, frozen=True, kw_only=True):
    """A name that can be asked for; an adapter's parent is the base model, and a merge has the names of its parts."""

    id: str
    object: str = "model"
    created: int = 0
    owned_by: str
    root: str
    parent: str | None = None
    max_model_len: int | None = None
    merged_from: list[str] | UnsetType = UNSET


class ModelList(msgspec.Struct, frozen=True, kw_only=True):
    """The answer of /v1/models."""

    object: str = "list"
    data: list[Model]


def models(state: ApiState) -> list[Model]:
    """Everything that can be asked for by everybody: the base, the names, and the public adapters fetched so far."""
    base = state.config.api.model_id
    length = state.limits.max_total_tokens if state.limits is not None else None
    adapters = state.adapters
    fetched = (one for one in adapters.dynamic() if one.found.scope is None)
    names = [(entry.name, _parts(entry)) for entry in adapters.registry.entries()]
    names += [(adapters.place_of(one.location), UNSET) for one in fetched]
    return [
        Model(id=base, owned_by=base, root=base, max_model_len=length),
        *(
            Model(id=name, owned_by=base, root=name, parent=base, max_model_len=length, merged_from=parts)
            for name, parts in names
        ),
    ]


def _parts(entry: AdapterEntry) -> list[str] | UnsetType:
    """What the version that gets requests was merged of; of several versions, the first."""
    merge = entry.versions[next(iter(entry.split))].merge
    return UNSET if merge is None else [*merge.ids]


async def list_models(request: Request) -> Response:
    """GET /v1/models."""
    return _json(ModelList(data=models(request.app.state.api)))


async def get_model(request: Request) -> Response:
    """GET /v1/models/{id}; an id may contain slashes, and an adapter's may have the base's name and a colon before."""
    state: ApiState = request.app.state.api
    model_id = request.path_params["model_id"].removeprefix(f"{state.config.api.model_id}:")
    for model in models(state):
        if model.id == model_id:
            return _json(model)
    state.adapters.registry.resolve(model_id)  # refuses what cannot be a name and says which are near
    raise AdapterNotFound(f"the model {model_id!r} is a version: ask for its name")


def _json(content: msgspec.Struct) -> Response:
    return Response(msgspec.json.encode(content), media_type="application/json")
