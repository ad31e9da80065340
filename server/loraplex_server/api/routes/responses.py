"""POST /v1/responses, text alone: a chat in another shape, whole or as its named events."""

import secrets
from collections.abc import Sequence
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from loraplex_server.api.adapter_access import with_headers
from loraplex_server.api.body import read_body
from loraplex_server.api.choices import ChoiceReason, ChoiceText, complete_all
from loraplex_server.api.disconnect import while_connected
from loraplex_server.api.generation import Generator
from loraplex_server.api.http_errors import ErrorBody, openai_error_body
from loraplex_server.api.job import Completion, TextDelta, Token
from loraplex_server.api.model_names import adapter_of
from loraplex_server.api.openai_stream import answer_headers, note_for_log, stream_response
from loraplex_server.api.routes.openai_chat import chat_prompt, chat_text
from loraplex_server.api.schemas.openai_answers import ChatLogprob, Spelling, chat_logprobs
from loraplex_server.api.schemas.responses import (
    IncompleteDetails,
    OutputMessage,
    OutputText,
    ResponseError,
    ResponsesAnswer,
    ResponsesBody,
    begun_answer,
    usage_of,
)
from loraplex_server.api.sse import named_event
from loraplex_server.api.state import ApiState


async def responses(request: Request) -> Response:
    """Answer an input."""
    body = await read_body(request, ResponsesBody)
    state: ApiState = request.app.state.api
    serving = await state.serving()
    chat = body.as_chat()
    chat.check(1)
    adapter_id = adapter_of(state, chat.model, chat.adapter_name, chat.adapter_access)
    job = with_headers(request, chat.job(await chat_prompt(state, serving, chat, adapter_id), adapter_id))
    note_for_log(request, adapter_id)
    begun = begun_answer(body, f"resp_{secrets.token_hex(16)}", adapter_id or state.config.api.model_id)
    generator = serving.generator
    if body.stream:
        return await stream_response(request, generator, [job], _Events(begun, _spelling(body, generator)))
    (finished,) = await while_connected(request, complete_all(generator, [job], request.state.request_id))
    text, reason = chat_text(chat, finished)
    end = finished.best.completion
    note_for_log(request, adapter_id, end.num_generated_tokens)
    logprobs = _logprobs(finished.best.tokens, finished.best.top_tokens, _spelling(body, generator))
    return Response(
        msgspec.json.encode(_ended(begun, _message(_message_id(begun), text, reason, logprobs), reason, end)),
        headers=answer_headers(state, adapter_id),
        media_type="application/json",
    )


def _message_id(begun: ResponsesAnswer) -> str:
    return "msg_" + begun.id.removeprefix("resp_")


def _spelling(body: ResponsesBody, generator: Generator) -> Spelling | None:
    """How tokens are shown beside the text; None where they are not asked for."""
    return generator.tokenizer if body.wants_logprobs else None


def _logprobs(
    tokens: Sequence[Token], top_tokens: Sequence[Sequence[Token]], spelling: Spelling | None
) -> list[ChatLogprob]:
    return [] if spelling is None else chat_logprobs(tokens, top_tokens, spelling).content


def _message(message_id: str, text: str, reason: ChoiceReason, logprobs: list[ChatLogprob]) -> OutputMessage:
    status = "incomplete" if reason == "length" else "completed"
    return OutputMessage(message_id, status, [OutputText(text, logprobs=logprobs)])  # type: ignore[arg-type]  # a Literal of the two


def _ended(begun: ResponsesAnswer, message: OutputMessage, reason: ChoiceReason, end: Completion) -> ResponsesAnswer:
    return msgspec.structs.replace(
        begun,
        status=message.status,
        output=[message],
        incomplete_details=IncompleteDetails() if reason == "length" else None,
        usage=usage_of(end.num_prompt_tokens, end.num_cached_tokens, end.num_generated_tokens),
    )


class _Events:
    """The events of a stream, each with its number and its name."""

    def __init__(self, begun: ResponsesAnswer, spelling: Spelling | None):
        self._begun = begun
        self._spelling = spelling
        self._logprobs: list[ChatLogprob] = []
        self._number = 0
        self._place = {"item_id": _message_id(begun), "output_index": 0, "content_index": 0}
        self._text = ChoiceText((), keeps_stop=False, shows_special=False)
        self._pieces: list[str] = []
        self._events: list[bytes] = []

    def delta(self, index: int, delta: TextDelta) -> bytes:
        """The events of a delta."""
        if self._number == 0:
            self._begin()
        pieces, reason = self._text.feed(delta)
        for i, piece in enumerate(pieces):
            logprobs = _logprobs(delta.tokens[i : i + 1], delta.top_tokens[i : i + 1], self._spelling)
            if piece or logprobs:
                self._add("response.output_text.delta", delta=piece, logprobs=logprobs, **self._place)
            self._logprobs += logprobs
        self._pieces += pieces
        if delta.completion is not None and reason is not None:
            self._finish(reason, delta.completion)
        return self._taken()

    def end(self) -> bytes:
        """Nothing is left to say."""
        return b""

    def fail(self, error: ErrorBody) -> bytes:
        """The answer as far as it came, and what ended it."""
        if self._number == 0:
            self._begin()
        failed = msgspec.structs.replace(
            self._begun, status="failed", error=ResponseError(error.error_type, error.error)
        )
        self._add("response.failed", response=failed)
        # The SDKs raise on `error`, which here is the same object as on every other route.
        self._add("error", **msgspec.to_builtins(openai_error_body(error)), code=error.error_type, message=error.error)
        return self._taken()

    def _begin(self) -> None:
        self._add("response.created", response=self._begun)
        self._add("response.in_progress", response=self._begun)
        item = OutputMessage(str(self._place["item_id"]), "in_progress", [])
        self._add("response.output_item.added", output_index=0, item=item)
        self._add("response.content_part.added", part=OutputText(""), **self._place)

    def _finish(self, reason: ChoiceReason, end: Completion) -> None:
        text = "".join(self._pieces)
        message = _message(str(self._place["item_id"]), text, reason, self._logprobs)
        ended = _ended(self._begun, message, reason, end)
        self._add("response.output_text.done", text=text, logprobs=self._logprobs, **self._place)
        self._add("response.content_part.done", part=message.content[0], **self._place)
        self._add("response.output_item.done", output_index=0, item=message)
        self._add(f"response.{ended.status}", response=ended)

    def _add(self, kind: str, **fields: Any) -> None:
        self._events.append(named_event(kind, {"type": kind, "sequence_number": self._number, **fields}))
        self._number += 1

    def _taken(self) -> bytes:
        events, self._events = self._events, []
        return b"".join(events)
