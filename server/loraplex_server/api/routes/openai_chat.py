"""POST /v1/chat/completions."""

import dataclasses
from collections.abc import Container

import msgspec
from msgspec import UNSET, UnsetType
from starlette.requests import Request
from starlette.responses import Response

from loraplex_server.api.adapter_access import with_headers
from loraplex_server.api.body import read_body
from loraplex_server.api.choices import ChoiceReason, ChoiceText, complete_all, repeated
from loraplex_server.api.disconnect import while_connected
from loraplex_server.api.http_errors import ErrorBody
from loraplex_server.api.job import FinishedJob, GenerationJob, TextDelta
from loraplex_server.api.model_names import adapter_of
from loraplex_server.api.openai_stream import (
    DONE,
    Envelope,
    answer_headers,
    failed,
    new_envelope,
    note_for_log,
    stream_response,
)
from loraplex_server.api.schemas.openai import ChatBody
from loraplex_server.api.schemas.openai_answers import (
    AssistantMessage,
    ChatAnswer,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatDelta,
    IdSpelling,
    PromptLogprobs,
    RunningUsage,
    Spelling,
    Usage,
    chat_logprobs,
    prompt_logprobs,
    shown_if_set,
    summed_usage,
)
from loraplex_server.api.sse import event
from loraplex_server.api.state import ApiState, Serving
from loraplex_server.api.tools import MessageReader, call_guide, whole_calls
from loraplex_server.errors import TemplateFailed
from loraplex_server.text.reasoning_reader import ALWAYS_OPEN, MARKERS, START, ReasoningReader


async def chat_completions(request: Request) -> Response:
    """Answer a conversation, whole or as a stream."""
    body = await read_body(request, ChatBody)
    return await answer_chat(request, body)


async def answer_chat(request: Request, body: ChatBody) -> Response:
    """The answer to a body that was read."""
    state: ApiState = request.app.state.api
    serving = await state.serving()
    body.check(state.config.api.max_concurrent_requests)
    adapter_id = adapter_of(state, body.model, body.adapter_name, body.adapter_access)
    job = with_headers(request, await chat_job(state, serving, body, adapter_id))
    jobs = repeated(job, body.num_choices)
    note_for_log(request, adapter_id)
    envelope = new_envelope(state, "chatcmpl", adapter_id)
    generator = serving.generator
    if body.stream:
        return await stream_response(request, generator, jobs, _ChatChunks(body, envelope, serving, job))
    finished = await while_connected(request, complete_all(generator, jobs, request.state.request_id))
    counts = summed_usage(finished, body.num_choices)
    note_for_log(request, adapter_id, counts.completion_tokens)
    answer = ChatAnswer(
        id=envelope.id,
        created=envelope.created,
        model=envelope.model,
        system_fingerprint=envelope.system_fingerprint,
        choices=[_choice(body, index, job, one, serving) for index, one in enumerate(finished)],
        usage=counts,
        prompt_token_ids=finished[0].best.completion.prompt_token_ids if body.return_token_ids else UNSET,
        prompt_logprobs=_prompt_logprobs(body, finished[0]),
    )
    return Response(
        msgspec.json.encode(answer), headers=answer_headers(state, adapter_id), media_type="application/json"
    )


async def chat_job(state: ApiState, serving: Serving, body: ChatBody, adapter_id: str | None) -> GenerationJob:
    """What a body asks for, with its prompt and the grammar that its tools need."""
    job = body.job(await chat_prompt(state, serving, body, adapter_id), adapter_id)
    use = body.tool_use()
    return job if use is None else dataclasses.replace(job, guide=await call_guide(serving, use, job.guide))


async def chat_prompt(state: ApiState, serving: Serving, body: ChatBody, adapter_id: str | None) -> str:
    """The text that the template makes of the messages: the adapter's own where that is allowed, or the model's."""
    template = serving.chat_template
    if adapter_id is not None and serving.adapter_templates is not None:
        async with state.adapters.held(adapter_id, body.adapter_access) as found:
            template = await serving.adapter_templates.template_of(found.spec) or template
    if template is None:
        raise TemplateFailed(
            "this model has no chat template; send a finished prompt to /v1/completions or /generate, or start the "
            "server with --tokenizer-config-path"
        )
    return await template.render_async(body.conversation())


def _choice_text(body: ChatBody, markers: Container[str] = frozenset()) -> ChoiceText:
    return ChoiceText(
        body.stop_texts,
        keeps_stop=bool(body.include_stop_str_in_output),
        shows_special=body.skip_special_tokens is False,
        markers=markers,
    )


def message_reader(body: ChatBody, serving: Serving, job: GenerationJob) -> MessageReader:
    """What takes one choice of the job apart into thoughts, text and calls."""
    use = body.tool_use()
    markers = serving.tool_format.markers if use is not None else frozenset[str]()
    thoughts = None
    # What must be of a form begins with that form.
    if serving.reasoning_parser != "none" and job.guide is None:
        markers |= MARKERS
        opens = serving.reasoning_parser == ALWAYS_OPEN or job.prompt.rstrip().endswith(START)
        thoughts = ReasoningReader(is_open=opens)
    return MessageReader(_choice_text(body, markers), use, serving.tool_format, thoughts)


def chat_text(body: ChatBody, job: FinishedJob) -> tuple[str, ChoiceReason]:
    """All that a finished job said, calls of tools as their text, and why it ended."""
    pieces, reason = _choice_text(body).feed(all_of(job))
    assert reason is not None, "a finished job has a reason"
    return "".join(pieces), reason


def _spelling(body: ChatBody, serving: Serving) -> Spelling:
    return IdSpelling() if body.return_tokens_as_token_ids else serving.generator.tokenizer


def all_of(job: FinishedJob) -> TextDelta:
    """A finished job's tokens and end as one delta."""
    whole = job.best
    return TextDelta(tokens=whole.tokens, top_tokens=whole.top_tokens, completion=whole.completion)


def _choice(body: ChatBody, index: int, asked: GenerationJob, job: FinishedJob, serving: Serving) -> ChatChoice:
    pieces, reason = message_reader(body, serving, asked).feed(all_of(job))
    assert reason is not None, "a finished job has a reason"
    text = "".join(piece.text for piece in pieces)
    thought = _shown_thought(body, "".join(piece.thought for piece in pieces))
    calls = whole_calls(pieces)
    message = AssistantMessage(
        (text or None) if calls or thought is not UNSET else text,
        tool_calls=calls or UNSET,
        reasoning=thought,
        reasoning_content=thought,
    )
    spelling = _spelling(body, serving)
    logprobs = chat_logprobs(job.best.tokens, job.best.top_tokens, spelling) if body.logprobs else None
    token_ids = [token.id for token in job.best.tokens] if body.return_token_ids else UNSET
    stop_reason = shown_if_set(job.best.completion.stop_reason)
    return ChatChoice(index, message, logprobs, reason, stop_reason, token_ids)


def _shown_thought(body: ChatBody, thought: str) -> str | UnsetType:
    return thought if thought and body.include_reasoning is not False else UNSET


def _prompt_logprobs(body: ChatBody, job: FinishedJob) -> PromptLogprobs | UnsetType:
    if body.prompt_logprobs is None:
        return UNSET
    return prompt_logprobs(job.best.completion.prompt_tokens, job.best.completion.prompt_top_tokens)


class _ChatChunks:
    """The events of a chat's stream: a chunk with the role, one a token that shows something, one with the reason."""

    def __init__(self, body: ChatBody, envelope: Envelope, serving: Serving, job: GenerationJob):
        self._body = body
        self._job = job
        self._envelope = envelope
        self._serving = serving
        self._spelling = _spelling(body, serving)
        self._readers: dict[int, MessageReader] = {}
        self._counts = RunningUsage(body.num_choices)

    def delta(self, index: int, delta: TextDelta) -> bytes:
        """The events of one choice's delta."""
        events: list[bytes] = []
        wants_ids = bool(self._body.return_token_ids)
        self._counts.add(index, delta)
        reader = self._readers.get(index)
        if reader is None:
            reader = self._readers[index] = message_reader(self._body, self._serving, self._job)
            first = ChatChunkChoice(index, ChatDelta(role="assistant", content=""))
            events.append(self._event(first, delta.prompt_token_ids if wants_ids else None))
        pieces, reason = reader.feed(delta)
        wants_logprobs = bool(self._body.logprobs)
        for i, piece in enumerate(pieces):
            thought = _shown_thought(self._body, piece.thought)
            if not (piece.text or piece.calls or thought or wants_logprobs or wants_ids):
                continue
            logprobs = (
                chat_logprobs([delta.tokens[i]], delta.top_tokens[i : i + 1], self._spelling)
                if wants_logprobs
                else None
            )
            has_other = bool(piece.calls) or thought is not UNSET
            gained = ChatDelta(
                content=piece.text if piece.text or not has_other else UNSET,
                tool_calls=piece.calls or UNSET,
                reasoning=thought,
                reasoning_content=thought,
            )
            token_ids = [delta.tokens[i].id] if wants_ids else UNSET
            events.append(self._event(ChatChunkChoice(index, gained, logprobs, token_ids=token_ids)))
        if delta.completion is not None:
            stop_reason = delta.completion.stop_reason
            last = ChatChunkChoice(index, ChatDelta(), finish_reason=reason, stop_reason=shown_if_set(stop_reason))
            events.append(self._event(last))
        return b"".join(events)

    def end(self) -> bytes:
        """The chunk with the counts, if it was asked for, and [DONE]."""
        if not self._body.wants_usage_chunk:
            return DONE
        return event(self._chunk([], self._counts.now, None)) + DONE

    def fail(self, error: ErrorBody) -> bytes:
        """The error and [DONE]."""
        return failed(error)

    def _event(self, choice: ChatChunkChoice, prompt_token_ids: list[int] | None = None) -> bytes:
        counts = self._counts.now if self._body.wants_running_usage else None
        return event(self._chunk([choice], counts, prompt_token_ids))

    def _chunk(
        self, choices: list[ChatChunkChoice], counts: Usage | None, prompt_token_ids: list[int] | None
    ) -> ChatChunk:
        envelope = self._envelope
        return ChatChunk(
            id=envelope.id,
            created=envelope.created,
            model=envelope.model,
            system_fingerprint=envelope.system_fingerprint,
            choices=choices,
            usage=counts if counts is not None or self._body.wants_usage_chunk else UNSET,
            prompt_token_ids=UNSET if prompt_token_ids is None else prompt_token_ids,
        )
