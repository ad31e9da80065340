"""What chat and completions share: an answer's names and headers, and the way a stream begins and ends."""

import logging
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Protocol
from urllib.parse import quote

from starlette.requests import Request
from starlette.responses import Response

from loraplex_server.api.choices import IndexedDelta, begin, stream_all
from loraplex_server.api.generation import Generator
from loraplex_server.api.http_errors import INTERNAL_ERROR, ErrorBody, error_body, openai_error_body
from loraplex_server.api.job import GenerationJob, TextDelta
from loraplex_server.api.sse import EventStream, event
from loraplex_server.api.state import ApiState
from loraplex_server.errors import LoraplexError

logger = logging.getLogger(__name__)

DONE = b"data: [DONE]\n\n"
SYSTEM_FINGERPRINT = "loraplex"


@dataclass(frozen=True, slots=True, kw_only=True)
class Envelope:
    """What every answer and chunk of one request says beside its choices."""

    id: str
    model: str
    created: int = field(default_factory=lambda: int(time.time()))
    system_fingerprint: str = SYSTEM_FINGERPRINT


def new_envelope(state: ApiState, prefix: str, adapter_id: str | None) -> Envelope:
    """The envelope of a request; its model is the adapter that answers, or the base."""
    return Envelope(id=f"{prefix}-{secrets.token_hex(12)}", model=adapter_id or state.config.api.model_id)


def answer_headers(state: ApiState, adapter_id: str | None) -> dict[str, str]:
    """What the headers of an answer say about the server and the adapter."""
    headers = {
        "x-compute-type": state.compute_type,
        "x-model-id": quote(state.config.api.model_id, safe="/:@ "),
    }
    if adapter_id is not None:
        headers["x-adapter-id"] = quote(adapter_id, safe="/:@ ")
    return headers


class ChunkWriter(Protocol):
    """Turns deltas into a dialect's events."""

    def delta(self, index: int, delta: TextDelta) -> bytes:
        """The events of one choice's delta."""

    def end(self) -> bytes:
        """What comes after the last delta of all choices; the stream's last words."""

    def fail(self, error: ErrorBody) -> bytes:
        """The stream's last words when it fails."""


async def stream_response(
    request: Request, generator: Generator, jobs: Sequence[GenerationJob], writer: ChunkWriter
) -> Response:
    """The stream of all jobs; a refusal that comes at once is raised instead, and has a status of its own."""
    state: ApiState = request.app.state.api
    deltas = await begin(stream_all(generator, jobs, request.state.request_id))
    return EventStream(_events(request, deltas, writer), answer_headers(state, jobs[0].adapter_id))


async def _events(
    request: Request, deltas: AsyncGenerator[IndexedDelta, None], writer: ChunkWriter
) -> AsyncIterator[bytes]:
    try:
        async with aclosing(deltas):
            async for index, delta in deltas:
                request.state.num_generated_tokens += len(delta.tokens)
                chunks = writer.delta(index, delta)
                if chunks:
                    yield chunks
        yield writer.end()
    except LoraplexError as error:
        request.state.error_type = error.error_type
        yield writer.fail(error_body(error))
    except Exception:
        # The status is out: the client learns of our mistake by an event, and the log has the cause.
        logger.exception("a stream failed")
        request.state.error_type = INTERNAL_ERROR.error_type
        yield writer.fail(INTERNAL_ERROR)


def failed(error: ErrorBody) -> bytes:
    """The last words of a failed stream of chat and completions."""
    return event(openai_error_body(error)) + DONE


def note_for_log(request: Request, adapter_id: str | None, num_tokens: int = 0) -> None:
    """What the access log says of the request."""
    request.state.adapter_id = adapter_id
    request.state.num_generated_tokens = num_tokens
