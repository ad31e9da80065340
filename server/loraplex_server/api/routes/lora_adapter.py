"""vLLM's POST /v1/load_lora_adapter and /v1/unload_lora_adapter, and SGLang's of the same name without /v1."""

from collections.abc import Awaitable, Callable

import msgspec
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from loraplex_server.adapter_changes import NameTaken
from loraplex_server.api.admin import require_admin
from loraplex_server.api.body import read_body
from loraplex_server.api.http_errors import RETRY_AFTER_S, STATUS_OF_TYPE, error_body
from loraplex_server.api.schemas.adapters import LoadLoraBody, UnloadLoraBody
from loraplex_server.api.state import ApiState
from loraplex_server.errors import AdapterNotFound, InvalidRequest, LoraplexError

ERROR_TYPES = {400: "InvalidUserInput", 403: "Forbidden", 404: "NotFoundError", 422: "BadRequestError"}


class _Refused(InvalidRequest):
    """What vLLM answers with 400."""


async def load(request: Request) -> Response:
    """Bring an adapter and serve it under a name."""
    try:
        name = await _load(request)
    except LoraplexError as error:
        return _refusal(request, error)
    return PlainTextResponse(f"Success: LoRA adapter '{name}' added successfully.")


async def unload(request: Request) -> Response:
    """Forget a name; its memory is given back when its last request has ended."""
    try:
        name = await _unload(request)
    except LoraplexError as error:
        return _refusal(request, error)
    return PlainTextResponse(f"Success: LoRA adapter '{name}' removed successfully.")


async def load_as_sglang(request: Request) -> Response:
    """The same as /v1/load_lora_adapter with SGLang's answer."""
    return await _sglang_answer(request, _load)


async def unload_as_sglang(request: Request) -> Response:
    """The same as /v1/unload_lora_adapter with SGLang's answer."""
    return await _sglang_answer(request, _unload)


async def _load(request: Request) -> str:
    require_admin(request)
    body = await read_body(request, LoadLoraBody)
    state: ApiState = request.app.state.api
    await state.serving()
    adapters = state.adapters
    if not body.lora_name or not body.lora_path:
        raise _Refused("Both 'lora_name' and 'lora_path' must be provided.")
    try:
        adapters.changes.check_name(body.lora_name)
    except InvalidRequest as error:
        raise _Refused(str(error)) from None
    location = adapters.location_of(body.lora_path)
    try:
        await adapters.changes.register(body.lora_name, location, replaces=bool(body.load_inplace))
    except NameTaken:
        raise _Refused(
            f"The lora adapter '{body.lora_name}' has already been loaded. To replace it, set `load_inplace` to true."
        ) from None
    if body.pinned is not None:
        await adapters.changes.pin(body.lora_name, body.pinned)
    return body.lora_name


async def _unload(request: Request) -> str:
    require_admin(request)
    body = await read_body(request, UnloadLoraBody)
    state: ApiState = request.app.state.api
    if not body.lora_name:
        raise _Refused("'lora_name' needs to be provided to unload a LoRA adapter.")
    if state.adapters.registry.find(body.lora_name) is None and state.adapters.forget_dynamic(body.lora_name):
        return body.lora_name
    try:
        await state.adapters.changes.unregister(body.lora_name)
    except AdapterNotFound:
        raise AdapterNotFound(f"The lora adapter '{body.lora_name[:512]}' cannot be found.") from None
    return body.lora_name


def _refusal(request: Request, error: LoraplexError) -> Response:
    """vLLM's error body, and the same at the top level, where some controllers look for it."""
    request.state.error_type = error.error_type
    status = 400 if isinstance(error, _Refused) else STATUS_OF_TYPE[error.error_type]
    message = str(error) if isinstance(error, _Refused) else error_body(error).error
    detail = {"message": message, "type": ERROR_TYPES.get(status, "InternalServerError"), "param": None, "code": status}
    content = {"error": detail, "object": "error", **detail, "error_type": error.error_type}
    headers = {"retry-after": str(RETRY_AFTER_S[error.error_type])} if error.error_type in RETRY_AFTER_S else {}
    return Response(msgspec.json.encode(content), status, headers, media_type="application/json")


async def _sglang_answer(request: Request, change: Callable[[Request], Awaitable[str]]) -> Response:
    message = None
    try:
        await change(request)
    except LoraplexError as error:
        request.state.error_type = error.error_type
        message = str(error)
    state: ApiState = request.app.state.api
    loaded = {entry.name: next(iter(entry.versions.values())).label for entry in state.adapters.registry.entries()}
    content = {"success": message is None, "error_message": message or "", "loaded_adapters": loaded}
    return Response(msgspec.json.encode(content), 400 if message else 200, media_type="application/json")
