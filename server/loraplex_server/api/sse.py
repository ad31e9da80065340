"""Server-sent events: framing, keep-alive, the client's disconnect."""

from collections.abc import AsyncIterator, Mapping

import msgspec
from sse_starlette.sse import AppStatus, EventSourceResponse
from starlette.types import Message, Send

KEEP_ALIVE_S = 15

# The library would cut streams at SIGTERM; `process.py` lets them finish.
AppStatus.enable_automatic_graceful_drain = False

_encode = msgspec.json.Encoder().encode


def event(data: object) -> bytes:
    """One event: `data: ` and JSON on one line, then a blank line."""
    return b"data: " + _encode(data) + b"\n\n"


def named_event(name: str, data: object) -> bytes:
    """One event with an `event:` line."""
    return b"event: " + name.encode() + b"\n" + event(data)


def _keep_alive() -> bytes:
    return b":\n\n"


class EventStream(EventSourceResponse):
    """Sends events as they come; a client that leaves, or is cut off for not reading, ends the iterator at once."""

    def __init__(self, events: AsyncIterator[bytes], headers: Mapping[str, str]):
        super().__init__(
            events,
            # Named here because the framework would add a charset: clients compare the type as a whole.
            headers={"content-type": "text/event-stream", "cache-control": "no-cache", **headers},
            ping=KEEP_ALIVE_S,
            sep="\n",
            ping_message_factory=_keep_alive,  # type: ignore[arg-type]  # bytes are sent as they are
        )

    async def _send_with_timeout(self, send: Send, message: Message) -> None:
        # The library opens a cancel scope for each event, a tenth of what a token costs here (bench/api.py).
        await send(message)
