"""POST /v1/responses: a chat in another shape, whole or as its named events."""

import secrets
from collections.abc import Sequence
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from loraplex_server.api.adapter_access import with_headers
from loraplex_server.api.body import read_body
from loraplex_server.api.choices import complete_all
from loraplex_server.api.disconnect import while_connected
from loraplex_server.api.http_errors import ErrorBody, openai_error_body
from loraplex_server.api.job import Completion, TextDelta
from loraplex_server.api.model_names import adapter_of
from loraplex_server.api.openai_stream import answer_headers, note_for_log, stream_response
from loraplex_server.api.response_items import EndStatus, ResponseItems, untold
from loraplex_server.api.routes.openai_chat import all_of, chat_job, message_reader
from loraplex_server.api.schemas.openai_answers import ChatLogprob, ChatReason, Spelling, chat_logprobs
from loraplex_server.api.schemas.responses import ResponsesBody
from loraplex_server.api.schemas.responses_answers import (
    IncompleteDetails,
    OutputItem,
    ResponseError,
    ResponsesAnswer,
    begun_answer,
    usage_of,
)
from loraplex_server.api.sse import named_event
from loraplex_server.api.state import ApiState
from loraplex_server.api.tools import MessageReader


async def responses(request: Request) -> Response:
    """Answer an input."""
    body = await read_body(request, ResponsesBody)
    state: ApiState = request.app.state.api
    serving = await state.serving()
    chat = body.as_chat()
    chat.check(1)
    adapter_id = adapter_of(state, chat.model, chat.adapter_name, chat.adapter_access)
    job = with_headers(request, await chat_job(state, serving, chat, adapter_id))
    note_for_log(request, adapter_id)
    begun = begun_answer(body, f"resp_{secrets.token_hex(16)}", adapter_id or state.config.api.model_id)
    generator = serving.generator
    reader = _Reader(message_reader(chat, serving, job), generator.tokenizer if body.wants_logprobs else None)
    if body.stream:
        return await stream_response(request, generator, [job], _Events(begun, reader))
    (finished,) = await while_connected(request, complete_all(generator, [job], request.state.request_id))
    end = finished.best.completion
    note_for_log(request, adapter_id, end.num_generated_tokens)
    items = ResponseItems(untold)
    reason = reader.feed(all_of(finished), items)
    assert reason is not None, "a finished job has a reason"
    items.end(_status(reason))
    return Response(
        msgspec.json.encode(_ended(begun, items.ended, _status(reason), end, reader.num_thought_tokens)),
        headers=answer_headers(state, adapter_id),
        media_type="application/json",
    )


def _status(reason: ChatReason) -> EndStatus:
    return "incomplete" if reason == "length" else "completed"


def _ended(
    begun: ResponsesAnswer, output: Sequence[OutputItem], status: EndStatus, end: Completion, num_thought_tokens: int
) -> ResponsesAnswer:
    return msgspec.structs.replace(
        begun,
        status=status,
        output=[*output],
        incomplete_details=IncompleteDetails() if status == "incomplete" else None,
        usage=usage_of(end.num_prompt_tokens, end.num_cached_tokens, end.num_generated_tokens, num_thought_tokens),
    )


class _Reader:
    """Turns deltas into pieces of items, with log-probabilities where tokens have a spelling."""

    def __init__(self, message: MessageReader, spelling: Spelling | None):
        self._message = message
        self._spelling = spelling

    @property
    def num_thought_tokens(self) -> int:
        """Tokens that the model thought with, so far."""
        return self._message.num_thought_tokens

    def feed(self, delta: TextDelta, items: ResponseItems) -> ChatReason | None:
        """Add a delta to the items; returns why the answer ended if it did."""
        pieces, reason = self._message.feed(delta)
        for i, piece in enumerate(pieces):
            items.add(piece, self._logprobs(delta, i))
        return reason

    def _logprobs(self, delta: TextDelta, i: int) -> list[ChatLogprob]:
        if self._spelling is None:
            return []
        return chat_logprobs(delta.tokens[i : i + 1], delta.top_tokens[i : i + 1], self._spelling).content


class _Events:
    """The events of a stream, each with its number and its name."""

    def __init__(self, begun: ResponsesAnswer, reader: _Reader):
        self._begun = begun
        self._reader = reader
        self._items = ResponseItems(self._tell)
        self._number = 0
        self._events: list[bytes] = []

    def delta(self, index: int, delta: TextDelta) -> bytes:
        """The events of a delta."""
        self._begin()
        reason = self._reader.feed(delta, self._items)
        if delta.completion is not None and reason is not None:
            self._items.end(_status(reason))
            ended = _ended(
                self._begun, self._items.ended, _status(reason), delta.completion, self._reader.num_thought_tokens
            )
            self._tell(ended.status, response=ended)
        return self._taken()

    def end(self) -> bytes:
        """Nothing is left to say."""
        return b""

    def fail(self, error: ErrorBody) -> bytes:
        """The answer as far as it came, and what ended it."""
        self._begin()
        failed = msgspec.structs.replace(
            self._begun, status="failed", error=ResponseError(error.error_type, error.error)
        )
        self._tell("failed", response=failed)
        # The SDKs raise on `error`, which here is the same object as on every other route.
        said = msgspec.to_builtins(openai_error_body(error))
        self._add("error", **said, code=error.error_type, message=error.error)
        return self._taken()

    def _begin(self) -> None:
        if self._number == 0:
            self._tell("created", response=self._begun)
            self._tell("in_progress", response=self._begun)

    def _tell(self, kind: str, **fields: Any) -> None:
        self._add(f"response.{kind}", **fields)

    def _add(self, kind: str, **fields: Any) -> None:
        self._events.append(named_event(kind, {"type": kind, "sequence_number": self._number, **fields}))
        self._number += 1

    def _taken(self) -> bytes:
        events, self._events = self._events, []
        return b"".join(events)
