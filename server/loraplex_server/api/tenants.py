"""Whose turn a request shares: what the scheduler is fair between, read from the request's head."""

import hashlib
from contextvars import ContextVar

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

# Set for the task that works on a request; None shares the turn of the request's adapter.
tenant: ContextVar[str | None] = ContextVar("tenant", default=None)


class Tenants:
    """Finds each request's tenant, by `--fairness-key`: adapter, api-key, none, or header:NAME."""

    def __init__(self, app: ASGIApp, fairness_key: str):
        self._app = app
        kind, _, name = fairness_key.partition(":")
        self._header = "authorization" if kind == "api-key" else name
        self._is_set = kind != "adapter"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run one request."""
        if scope["type"] != "http" or not self._is_set:
            await self._app(scope, receive, send)
            return
        value = Headers(scope=scope).get(self._header, "") if self._header else ""
        # A name of fixed size that gives no key away, wherever the engine may show it.
        name = hashlib.sha256(value.encode()).hexdigest()[:32] if value else ""
        token = tenant.set(name)
        try:
            await self._app(scope, receive, send)
        finally:
            tenant.reset(token)
