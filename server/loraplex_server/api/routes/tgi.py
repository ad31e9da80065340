"""TGI's routes /, /generate and /generate_stream, with LoRAX's adapter fields."""

import dataclasses
import logging
from collections.abc import AsyncIterator
from contextlib import aclosing
from urllib.parse import quote

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from loraplex_server.api.adapter_access import with_headers
from loraplex_server.api.body import read_body
from loraplex_server.api.disconnect import while_connected
from loraplex_server.api.generation import Generator
from loraplex_server.api.http_errors import INTERNAL_ERROR, ErrorBody, error_body
from loraplex_server.api.job import FinishedJob, GenerationJob, TextDelta
from loraplex_server.api.schemas.tgi import (
    CompatGenerateBody,
    GenerateBody,
    StreamEvent,
    answer,
    stream_details,
    with_alternatives,
)
from loraplex_server.api.sse import EventStream, event
from loraplex_server.api.state import ApiState
from loraplex_server.errors import IncompleteGeneration, LoraplexError

logger = logging.getLogger(__name__)


async def generate(request: Request) -> Response:
    """POST /generate: one answer object."""
    body = await read_body(request, GenerateBody)
    return await _answer(request, body, full_text=body.wants_full_text(), as_list=False)


async def generate_stream(request: Request) -> Response:
    """POST /generate_stream: one event a token; refusals too are events, behind a status of 200."""
    body = await read_body(request, GenerateBody)
    return await _stream(request, body, full_text=body.wants_full_text())


async def compat_generate(request: Request) -> Response:
    """POST /: a list of one answer, or a stream; the prompt stands in front of the text unless the client objects."""
    return await answer_compat(request, await read_body(request, CompatGenerateBody))


async def answer_compat(request: Request, body: CompatGenerateBody) -> Response:
    """The answer of POST / to a body that was read."""
    full_text = body.wants_full_text(default=True)
    if body.stream:
        return await _stream(request, body, full_text=full_text)
    return await _answer(request, body, full_text=full_text, as_list=True)


async def _answer(request: Request, body: GenerateBody, *, full_text: bool, as_list: bool) -> Response:
    state: ApiState = request.app.state.api
    generator = (await state.serving()).generator
    job = with_headers(request, body.job(stream=False))
    finished = await while_connected(request, generator.complete(job, request.state.request_id))
    content = answer(body, finished, full_text=full_text)
    _note_for_log(request, job, finished.best.completion.num_generated_tokens)
    return Response(
        msgspec.json.encode([content] if as_list else content),
        headers=_common_headers(state, job) | _measured_headers(finished),
        media_type="application/json",
    )


async def _stream(request: Request, body: GenerateBody, *, full_text: bool) -> Response:
    state: ApiState = request.app.state.api
    generator = (await state.serving()).generator
    prefix = body.inputs if full_text else ""
    try:
        job = with_headers(request, body.job(stream=True))
    except LoraplexError as error:
        # Not yet a job: refused all the same as one, in the stream.
        return EventStream(_one_event(request, error), {"x-compute-characters": str(len(body.inputs))})
    events = _events(request, generator, job, body, prefix=prefix)
    return EventStream(events, _common_headers(state, job))


async def _one_event(request: Request, error: LoraplexError) -> AsyncIterator[bytes]:
    yield event(_stream_error(request, error))


async def _events(
    request: Request, generator: Generator, job: GenerationJob, body: GenerateBody, *, prefix: str
) -> AsyncIterator[bytes]:
    """The stream's bytes; what waits together goes out together."""
    index = 0
    try:
        async with aclosing(generator.stream(job, request.state.request_id)) as deltas:
            async for delta in deltas:
                shown = _with_alternatives(delta) if body.wants_alternatives else delta
                yield b"".join(event(one) for one in _stream_events(shown, index, prefix, body.wants_details))
                index += len(delta.tokens)
                _note_for_log(request, job, index)
    except LoraplexError as error:
        yield event(_stream_error(request, error))
    except Exception:
        # The status is out: the client learns of our mistake by an event, and the log has the cause.
        logger.exception("a stream failed")
        request.state.error_type = "internal"
        yield event(INTERNAL_ERROR)


def _with_alternatives(delta: TextDelta) -> TextDelta:
    return dataclasses.replace(delta, tokens=with_alternatives(delta.tokens, delta.top_tokens), top_tokens=[])


def _stream_events(delta: TextDelta, index: int, prefix: str, details: bool) -> list[StreamEvent]:
    end = delta.completion
    last = len(delta.tokens) - 1 if end is not None else -1
    return [
        StreamEvent(
            index=index + i + 1,
            token=token,
            top_tokens=delta.top_tokens[i] if delta.top_tokens else msgspec.UNSET,
            generated_text=prefix + end.text if end is not None and i == last else None,
            details=stream_details(end) if details and end is not None and i == last else None,
        )
        for i, token in enumerate(delta.tokens)
    ]


def _stream_error(request: Request, error: LoraplexError) -> ErrorBody:
    body = error_body(error)
    if isinstance(error, IncompleteGeneration):
        body = ErrorBody("Incomplete generation stream", "incomplete_generation_stream")
    request.state.error_type = body.error_type
    return body


def _common_headers(state: ApiState, job: GenerationJob) -> dict[str, str]:
    headers = {
        "x-compute-type": state.compute_type,
        "x-compute-characters": str(len(job.prompt)),
        "x-model-id": quote(state.config.api.model_id, safe="/:@ "),
    }
    # A stream's headers go out before its checks; they must not name an adapter that will be refused.
    if job.adapter_id is not None and state.adapters.is_here(job.adapter_id, job.adapter_access):
        headers["x-adapter-id"] = quote(job.adapter_id, safe="/:@ ")
    return headers


def _measured_headers(finished: FinishedJob) -> dict[str, str]:
    end = finished.best.completion
    timings = finished.timings
    return {
        "x-compute-time": str(timings.total_s),
        "x-total-time": _ms(timings.total_s),
        "x-validation-time": _ms(timings.validation_s),
        "x-queue-time": _ms(timings.queue_s),
        "x-inference-time": _ms(timings.inference_s),
        "x-time-per-token": _ms(timings.inference_s / max(end.num_generated_tokens, 1)),
        "x-time-to-first-token": _ms(timings.first_token_s),
        "x-prompt-tokens": str(end.num_prompt_tokens),
        "x-generated-tokens": str(end.num_generated_tokens),
        "x-total-tokens": str(end.num_prompt_tokens + end.num_generated_tokens),
    }


def _ms(seconds: float) -> str:
    return str(round(seconds * 1000))


def _note_for_log(request: Request, job: GenerationJob, num_tokens: int) -> None:
    request.state.adapter_id = job.adapter_name
    request.state.num_generated_tokens = num_tokens
