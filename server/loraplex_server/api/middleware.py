"""API keys, request ids, the body limit and the access log, as plain ASGI: nothing stands between a route and its
client's disconnect."""

import hmac
import logging
import re
import secrets
import time

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from loraplex_server.api.http_errors import error_response, internal_error_response
from loraplex_server.errors import BodyTooLarge, Unauthorized
from loraplex_server.log import request_id as logged_request_id

access_logger = logging.getLogger("loraplex.access")

_safe_request_id = re.compile(r"[A-Za-z0-9._-]{1,128}").fullmatch
# The prober and the scraper have no key.
_QUIET_PATHS = {"/", "/health", "/health/live", "/health/ready", "/startup", "/ping", "/metrics"}
_OPEN_ROUTES = {("GET", path) for path in _QUIET_PATHS}


class RequestLog:
    """Gives every request an id, returns it as x-request-id, and logs one line when the request has ended.

    Routes add to that line through `request.state`: error_type, adapter_id, num_generated_tokens. No prompt, no
    output and no header's value is ever in it.
    """

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = Headers(scope=scope).get("x-request-id", "")
        if not _safe_request_id(request_id):
            request_id = secrets.token_hex(8)
        state = scope.setdefault("state", {})
        state["request_id"] = request_id
        token = logged_request_id.set(request_id)
        started = time.monotonic()
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except Exception:
            # Our mistake: this request gets an answer, and the log its cause.
            access_logger.exception("a request failed")
            state["error_type"] = "internal"
            if status:
                raise  # an answer was begun and cannot be completed: the server cuts the connection
            await internal_error_response(scope["path"])(scope, receive, send_with_id)
        finally:
            _log_request(scope, status, time.monotonic() - started)
            logged_request_id.reset(token)


def _log_request(scope: Scope, status: int, seconds: float) -> None:
    is_probe = scope["method"] == "GET" and scope["path"] in _QUIET_PATHS
    level = logging.DEBUG if is_probe else logging.INFO
    if not access_logger.isEnabledFor(level):
        return
    state = scope["state"]
    path = scope.get("raw_path", b"").decode("ascii", "backslashreplace")[:200] or scope["path"][:200]
    parts = [f"{scope['method'][:16]} {path} {status} {seconds * 1000:.0f}ms"]
    if state.get("adapter_id") is not None:
        parts.append(f"adapter={state['adapter_id']!r}")
    if "num_generated_tokens" in state:
        parts.append(f"tokens={state['num_generated_tokens']}")
    if "error_type" in state:
        parts.append(f"error={state['error_type']}")
    access_logger.log(level, " ".join(parts))


class ApiKeys:
    """Lets requests pass that carry one of the keys as `Authorization: Bearer KEY` or `X-API-Key: KEY`; all of them
    when there are no keys."""

    def __init__(self, app: ASGIApp, keys: tuple[str, ...]):
        self._app = app
        self._keys = [key.encode() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run or refuse one request."""
        if scope["type"] == "http" and not self._may_pass(scope):
            scope["state"]["error_type"] = Unauthorized.error_type
            response = error_response(
                Unauthorized(
                    "this server needs a key: send the header `Authorization: Bearer KEY`, or `X-API-Key: KEY`"
                ),
                scope["path"],
            )
            await response(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _may_pass(self, scope: Scope) -> bool:
        method = "GET" if scope["method"] == "HEAD" else scope["method"]
        if not self._keys or (method, scope["path"]) in _OPEN_ROUTES:
            return True
        headers = Headers(scope=scope)
        scheme, _, bearer = headers.get("authorization", "").partition(" ")
        given = [headers.get("x-api-key", "").strip(), bearer.strip() if scheme.lower() == "bearer" else ""]
        # Every key is compared, and each in a time that does not depend on where it differs.
        return any(
            [hmac.compare_digest(key, one.encode("utf-8", "replace")) for key in self._keys for one in given if one]
        )


def _is_upload(scope: Scope) -> bool:
    """Whether the route streams the body to disk, with a limit of its own."""
    media_type = Headers(scope=scope).get("content-type", "").lower()
    is_file_route = scope["method"] == "PUT" and scope["path"].startswith("/adapters/")
    return is_file_route and media_type.startswith("multipart/form-data")


class BodyLimit:
    """Refuses a body above the limit: by its announced length, or as soon as more than that has arrived."""

    def __init__(self, app: ASGIApp, limit: int):
        self._app = app
        self._limit = limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run or refuse one request."""
        if scope["type"] != "http" or _is_upload(scope):
            await self._app(scope, receive, send)
            return
        too_large = BodyTooLarge(f"the request's body is larger than {self._limit} bytes (--payload-limit)")
        announced = Headers(scope=scope).get("content-length", "")
        if announced.isdecimal() and int(announced) > self._limit:
            scope["state"]["error_type"] = too_large.error_type
            await error_response(too_large, scope["path"])(scope, receive, send)
            return
        num_bytes = 0

        async def receive_some() -> Message:
            nonlocal num_bytes
            message = await receive()
            if message["type"] == "http.request":
                num_bytes += len(message.get("body", b""))
                if num_bytes > self._limit:
                    raise too_large
            return message

        await self._app(scope, receive_some, send)
