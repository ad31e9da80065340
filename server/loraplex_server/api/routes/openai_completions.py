"""POST /v1/completions."""

from collections.abc import Sequence

import msgspec
from msgspec import UNSET, UnsetType
from msgspec.structs import replace
from starlette.requests import Request
from starlette.responses import Response

from loraplex_server.api.adapter_access import with_headers
from loraplex_server.api.body import read_body
from loraplex_server.api.choices import ChoiceText, complete_all, repeated
from loraplex_server.api.disconnect import while_connected
from loraplex_server.api.http_errors import ErrorBody
from loraplex_server.api.job import FinishedJob, TextDelta
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
from loraplex_server.api.schemas.openai import CompletionBody
from loraplex_server.api.schemas.openai_answers import (
    CompletionAnswer,
    CompletionChoice,
    CompletionLogprobs,
    CompletionLogprobsWriter,
    IdSpelling,
    RunningUsage,
    Spelling,
    Usage,
    joined,
    prompt_logprobs,
    shown_if_set,
    summed_usage,
)
from loraplex_server.api.sse import event
from loraplex_server.api.state import ApiState
from loraplex_server.errors import InvalidRequest
from loraplex_server.text.tokenizer import Tokenizer

Prompts = Sequence[str | tuple[int, ...]]


async def completions(request: Request) -> Response:
    """Continue one or several prompts, whole or as a stream."""
    body = await read_body(request, CompletionBody)
    return await answer_completion(request, body)


async def answer_completion(request: Request, body: CompletionBody) -> Response:
    """The answer to a body that was read."""
    state: ApiState = request.app.state.api
    generator = (await state.serving()).generator
    api = state.config.api
    body.check(api.max_concurrent_requests)
    prompts = body.prompts
    _check_number(len(prompts), body.num_choices, api.max_client_batch_size, api.max_concurrent_requests)
    adapter_id = adapter_of(state, body.model, body.adapter_name, body.adapter_access)
    jobs = [
        job
        for prompt in prompts
        for job in repeated(with_headers(request, body.job(prompt, adapter_id)), body.num_choices)
    ]
    note_for_log(request, adapter_id)
    envelope = new_envelope(state, "cmpl", adapter_id)
    shown = _Shown(body, prompts, generator.tokenizer)
    if body.stream:
        return await stream_response(request, generator, jobs, _CompletionChunks(shown, envelope))
    finished = await while_connected(request, complete_all(generator, jobs, request.state.request_id))
    counts = summed_usage(finished, body.num_choices, shown.num_unseen_tokens)
    note_for_log(request, adapter_id, counts.completion_tokens)
    choices = [shown.whole(index, job) for index, job in enumerate(finished)]
    return Response(
        msgspec.json.encode(_answer(envelope, choices, counts)),
        headers=answer_headers(state, adapter_id),
        media_type="application/json",
    )


def _check_number(num_prompts: int, num_choices: int, max_prompts: int, max_sequences: int) -> None:
    if num_prompts == 0:
        raise InvalidRequest("`prompt` must not be empty")
    if num_prompts > max_prompts:
        raise InvalidRequest(
            f"batch size exceeded: `prompt` has {num_prompts} prompts, the limit is {max_prompts} "
            "(--max-client-batch-size)"
        )
    if num_prompts * num_choices > max_sequences:
        raise InvalidRequest(f"{num_prompts} prompts with `n` {num_choices} are more than the limit of {max_sequences}")


def _answer(envelope: Envelope, choices: list[CompletionChoice], counts: Usage | UnsetType | None) -> CompletionAnswer:
    return CompletionAnswer(
        id=envelope.id,
        created=envelope.created,
        model=envelope.model,
        system_fingerprint=envelope.system_fingerprint,
        choices=choices,
        usage=counts,
    )


class _Shown:
    """What a request's choices show of prompt and output."""

    def __init__(self, body: CompletionBody, prompts: Prompts, tokenizer: Tokenizer):
        self.body = body
        self._prompts = prompts
        self._tokenizer = tokenizer
        self._spelling: Spelling = IdSpelling() if body.return_tokens_as_token_ids else tokenizer
        # An echo without output has one token that is generated and not shown.
        self.num_unseen_tokens = int(body.max_tokens == 0)

    def new_text(self) -> ChoiceText:
        """The text of one choice, to be fed."""
        body = self.body
        return ChoiceText(
            body.stop_texts,
            keeps_stop=bool(body.include_stop_str_in_output),
            shows_special=body.skip_special_tokens is False,
        )

    def new_logprobs(self) -> CompletionLogprobsWriter | None:
        """The log-probabilities of one choice, to be fed; None when they were not asked for."""
        return None if self.body.logprobs is None else CompletionLogprobsWriter(self._spelling)

    def echo(self, index: int) -> str:
        """The prompt in front of a choice's text."""
        if not self.body.echo:
            return ""
        prompt = self._prompts[index // self.body.num_choices]
        return prompt if isinstance(prompt, str) else self._tokenizer.decode(prompt, skip_special_tokens=False)

    def whole(self, index: int, job: FinishedJob) -> CompletionChoice:
        """One choice at its end."""
        best = job.best
        writer = self.new_logprobs()
        logprobs = None
        if writer is not None:
            shown_prompt = best.completion.prompt_tokens if self.body.echo else []
            prompt = writer.prompt(shown_prompt, best.completion.prompt_top_tokens)
            logprobs = prompt if self.num_unseen_tokens else joined(prompt, writer.output(best.tokens, best.top_tokens))
        if self.num_unseen_tokens:
            return self._with_ids(CompletionChoice(index, self.echo(index), logprobs, "length"), job, [])
        pieces, reason = self.new_text().feed(
            TextDelta(tokens=best.tokens, top_tokens=best.top_tokens, completion=best.completion)
        )
        text = self.echo(index) + "".join(pieces)
        choice = CompletionChoice(index, text, logprobs, reason, shown_if_set(best.completion.stop_reason))
        return self._with_ids(choice, job, [token.id for token in best.tokens])

    def _with_ids(self, choice: CompletionChoice, job: FinishedJob, token_ids: list[int]) -> CompletionChoice:
        """The choice with what vLLM's fields add to it."""
        end = job.best.completion
        if self.body.return_token_ids:
            choice = replace(choice, token_ids=token_ids, prompt_token_ids=end.prompt_token_ids)
        if self.body.prompt_logprobs is not None:
            choice = replace(choice, prompt_logprobs=prompt_logprobs(end.prompt_tokens, end.prompt_top_tokens))
        return choice


class _CompletionChunks:
    """The events of a stream: one a token that shows something; the last of a choice has the reason."""

    def __init__(self, shown: _Shown, envelope: Envelope):
        self._shown = shown
        self._envelope = envelope
        self._choices: dict[int, tuple[ChoiceText, CompletionLogprobsWriter | None]] = {}
        self._counts = RunningUsage(shown.body.num_choices)

    def delta(self, index: int, delta: TextDelta) -> bytes:
        """The events of one choice's delta."""
        shown = self._shown
        events: list[bytes] = []
        wants_ids = bool(shown.body.return_token_ids)
        self._counts.add(index, delta)
        end = delta.completion
        if end is not None:
            self._counts.leave_out(shown.num_unseen_tokens)
        choice = self._choices.get(index)
        if choice is None:
            choice = self._choices[index] = shown.new_text(), shown.new_logprobs()
            if shown.body.echo or wants_ids:
                prompt_ids = delta.prompt_token_ids if wants_ids and delta.prompt_token_ids is not None else UNSET
                events.append(self._event(CompletionChoice(index, shown.echo(index), prompt_token_ids=prompt_ids)))
        text, writer = choice
        pieces, reason = text.feed(delta)
        last = len(pieces) - 1
        for i, piece in enumerate(pieces):
            is_end = end is not None and i == last
            if shown.num_unseen_tokens:
                if is_end:
                    events.append(self._event(CompletionChoice(index, "", None, "length")))
            elif piece or writer is not None or wants_ids or is_end:
                logprobs: CompletionLogprobs | None = None
                if writer is not None:
                    logprobs = writer.output([delta.tokens[i]], delta.top_tokens[i : i + 1])
                one = CompletionChoice(index, piece, logprobs, reason if is_end else None)
                if end is not None and is_end:
                    one = replace(one, stop_reason=shown_if_set(end.stop_reason))
                events.append(self._event(replace(one, token_ids=[delta.tokens[i].id]) if wants_ids else one))
        return b"".join(events)

    def end(self) -> bytes:
        """The chunk with the counts, if it was asked for, and [DONE]."""
        if not self._shown.body.wants_usage_chunk:
            return DONE
        return event(_answer(self._envelope, [], self._counts.now)) + DONE

    def fail(self, error: ErrorBody) -> bytes:
        """The error and [DONE]."""
        return failed(error)

    def _event(self, choice: CompletionChoice) -> bytes:
        counts: Usage | UnsetType | None = None if self._shown.body.wants_usage_chunk else UNSET
        if self._shown.body.wants_running_usage:
            counts = self._counts.now
        return event(_answer(self._envelope, [choice], counts))
