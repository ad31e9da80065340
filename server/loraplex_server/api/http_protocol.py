"""uvicorn's HTTP protocol with time limits for headers and readers, limits of size, and JSON in its own refusals."""

import asyncio
import logging
import sys
from typing import Any

import h11
import msgspec
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from loraplex_server.api.http_errors import ErrorBody, error_response
from loraplex_server.errors import HeadersTooLarge

logger = logging.getLogger(__name__)

# A client that for so long takes nothing of what waits for it has stopped reading.
STALLED_READER_S = 60.0
# From the first byte, or from the connection's beginning, to the end of a request's headers.
HEADER_TIMEOUT_S = 10.0
# How long bytes behind a refusal are still taken: a reset would take the refusal away before the client has read it.
LINGER_S = 1.0
MAX_HEADER_BYTES = 64 * 1024
MAX_HEADERS = 100
MAX_HEADER_LINE_BYTES = 16 * 1024

_REASONS = {400: b"Bad Request", 408: b"Request Timeout", 431: b"Request Header Fields Too Large"}


class HttpProtocol(H11Protocol):
    """One connection. A client that sends its headers too slowly, or without end, is answered and cut off.

    One that does not read is cut off, which ends its request; the timer for that costs nothing while a stream flows.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._header_timer: asyncio.TimerHandle | None = None
        self._linger_timer: asyncio.TimerHandle | None = None  # once the connection was refused
        self._stall_timer: asyncio.TimerHandle | None = None  # while more waits for the client than is buffered

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as in uvicorn
        """A client is there."""
        super().connection_made(transport)
        self._start_header_timer()

    def data_received(self, data: bytes) -> None:
        """Bytes came."""
        if self._linger_timer is not None:
            return
        if self._header_timer is None and self.conn.their_state is h11.IDLE:
            self._start_header_timer()
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:
            self._stop_header_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        """The client is gone."""
        self._stop_header_timer()
        self._stop_stall_timer()
        if self._linger_timer is not None:
            self._linger_timer.cancel()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """The client has not taken what was sent, and the buffer is full."""
        super().pause_writing()
        self._stop_stall_timer()
        self._stall_timer = self.loop.call_later(STALLED_READER_S, self._reader_stalled)

    def resume_writing(self) -> None:
        """The client reads again."""
        self._stop_stall_timer()
        super().resume_writing()

    def send_400_response(self, msg: str) -> None:
        """Refuse bytes that are no request: uvicorn calls it with h11's finding at hand."""
        found = sys.exception()
        hint = found.error_status_hint if isinstance(found, h11.RemoteProtocolError) else 400
        if hint == 431:
            self._refuse(431, ErrorBody(_too_large("headers"), HeadersTooLarge.error_type))
        else:
            self._refuse(400, ErrorBody(f"no valid HTTP request: {found or msg}", "invalid_http"))

    def _start_header_timer(self) -> None:
        self._header_timer = self.loop.call_later(HEADER_TIMEOUT_S, self._headers_late)

    def _stop_header_timer(self) -> None:
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None

    def _stop_stall_timer(self) -> None:
        if self._stall_timer is not None:
            self._stall_timer.cancel()
            self._stall_timer = None

    def _reader_stalled(self) -> None:
        logger.info(
            "a client has read nothing for %g s: its connection is cut, its request cancelled", STALLED_READER_S
        )
        self.transport.abort()

    def _headers_late(self) -> None:
        self._header_timer = None
        if self.conn.trailing_data[0]:
            text = f"the request's headers did not arrive within {HEADER_TIMEOUT_S:g} s"
            self._refuse(408, ErrorBody(text, "timeout"))
        else:
            self.transport.close()

    def _refuse(self, status: int, body: ErrorBody) -> None:
        """Answer past h11, which is in the middle of something, and close when the client does or soon after."""
        self._stop_header_timer()
        content = msgspec.json.encode(body)
        self.transport.write(
            b"HTTP/1.1 %d %s\r\ncontent-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n%s"
            % (status, _REASONS[status], len(content), content)
        )
        if self.transport.can_write_eof():
            self.transport.write_eof()
            self._linger_timer = self.loop.call_later(LINGER_S, self.transport.close)
        else:
            self.transport.close()


class HeaderLimits:
    """Refuses a request whose headers came whole and are too large or too many."""

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run or refuse one request."""
        if scope["type"] == "http":
            sizes = [len(name) + len(value) for name, value in scope["headers"]]
            if (
                len(sizes) > MAX_HEADERS
                or sum(sizes) > MAX_HEADER_BYTES
                or max(sizes, default=0) > MAX_HEADER_LINE_BYTES
            ):
                scope["state"]["error_type"] = HeadersTooLarge.error_type
                refusal = HeadersTooLarge(_too_large(f"{len(sizes)} headers with {sum(sizes)} bytes"))
                await error_response(refusal, scope["path"])(scope, receive, send)
                return
        await self._app(scope, receive, send)


def _too_large(what: str) -> str:
    return (
        f"the request's {what} are too large: at most {MAX_HEADERS} headers, {MAX_HEADER_LINE_BYTES} bytes each, "
        f"{MAX_HEADER_BYTES} bytes together"
    )
