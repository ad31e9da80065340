"""GET /v1/models and /v1/models/{id}: the base model first, then the adapters."""

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from loraplex_server.api.state import ApiState
from loraplex_server.errors import AdapterNotFound


class Model(msgspec.Struct, frozen=True, kw_only=True):
    """A name that can be asked for; an adapter's parent is the base model."""

    id: str
    object: str = "model"
    created: int = 0
    owned_by: str
    root: str
    parent: str | None = None
    max_model_len: int | None = None


class ModelList(msgspec.Struct, frozen=True, kw_only=True):
    """The answer of /v1/models."""

    object: str = "list"
    data: list[Model]


def models(state: ApiState) -> list[Model]:
    """Everything that can be asked for."""
    base = state.config.api.model_id
    length = state.limits.max_total_tokens if state.limits is not None else None
    return [
        Model(id=base, owned_by=base, root=base, max_model_len=length),
        *(
            Model(id=spec.adapter_id, owned_by=base, root=spec.adapter_id, parent=base, max_model_len=length)
            for spec in state.registry.list()
        ),
    ]


async def list_models(request: Request) -> Response:
    """GET /v1/models."""
    return _json(ModelList(data=models(request.app.state.api)))


async def get_model(request: Request) -> Response:
    """GET /v1/models/{id}; an id may contain slashes."""
    model_id = request.path_params["model_id"]
    state: ApiState = request.app.state.api
    if model_id != state.config.api.model_id:
        state.registry.resolve(model_id)  # refuses an unknown name and says which are near
    for model in models(state):
        if model.id == model_id:
            return _json(model)
    raise AdapterNotFound(f"the model {model_id!r} does not exist")


def _json(content: msgspec.Struct) -> Response:
    return Response(msgspec.json.encode(content), media_type="application/json")
