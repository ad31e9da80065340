"""Who may change adapters while the server runs."""

import hmac

from starlette.requests import Request

from loraplex_server.api.state import ApiState
from loraplex_server.errors import Forbidden


def is_admin(request: Request) -> bool:
    """Whether the caller may change adapters."""
    try:
        require_admin(request)
    except Forbidden:
        return False
    return True


def require_admin(request: Request) -> None:
    """Refuse whoever may not change adapters. Raises Forbidden with what is missing."""
    state: ApiState = request.app.state.api
    config = state.config.adapter_sources
    if config.admin_api_key is None:
        if config.allow_runtime_adapters:
            return
        raise Forbidden(
            "this server's adapters cannot be changed while it runs: start it with --admin-api-key KEY, or with"
            " --allow-runtime-adapters to let every caller (VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 means the same)"
        )
    scheme, _, bearer = request.headers.get("authorization", "").partition(" ")
    given = (request.headers.get("x-api-key", "").strip(), bearer.strip() if scheme.lower() == "bearer" else "")
    wanted = config.admin_api_key.encode()
    if not any([hmac.compare_digest(wanted, one.encode("utf-8", "replace")) for one in given]):
        raise Forbidden(
            "changing adapters needs the admin key (--admin-api-key): send it as `Authorization: Bearer KEY`, or as"
            " `X-API-Key: KEY`"
        )
