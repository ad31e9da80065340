"""One job's life: admit, submit, stream the text, stop, cancel; `best_of`."""

import asyncio
import dataclasses
import itertools
import time
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing

import msgspec

from loraplex_server.api.admission import Admission, AdmittedJob, new_seed
from loraplex_server.api.client import EngineClient
from loraplex_server.api.job import Completion, FinishedJob, FinishedSequence, GenerationJob, TextDelta, Token
from loraplex_server.api.sequence_text import SequenceText
from loraplex_server.api.tenants import tenant
from loraplex_server.errors import IncompleteGeneration, LoraplexError
from loraplex_server.messages import GenerateRequest, TokenOutput
from loraplex_server.metrics import Metrics, Timings
from loraplex_server.text.tokenizer import Tokenizer


class Generator:
    """Runs jobs on the engine. Cancelling what it returns takes the job's requests off the engine."""

    def __init__(self, admission: Admission, client: EngineClient, tokenizer: Tokenizer, metrics: Metrics):
        self.admission = admission
        self.tokenizer = tokenizer
        self._client = client
        self._metrics = metrics
        self._numbers = itertools.count()

    async def stream(self, job: GenerationJob, request_id: str) -> AsyncGenerator[TextDelta, None]:
        """Yield the job's text as it comes; ends after the delta that has a completion."""
        started = time.monotonic()
        with self._metrics.job() as measured:
            self.admission.check_shape(job)
            async with self.admission.admitted(job, 1) as admitted:
                measured.admitted(_label(admitted), admitted.sampling.max_new_tokens)
                timings = Timings(validation_s=admitted.validation_s)
                async with aclosing(self._sequence(job, admitted, request_id, timings, started)) as deltas:
                    async for delta in deltas:
                        if delta.completion is not None:
                            # Before the yield: a client may close the connection on the last event.
                            timings.total_s = time.monotonic() - started
                            measured.finished([_lengths(delta.completion)], timings)
                        yield delta

    async def complete(self, job: GenerationJob, request_id: str) -> FinishedJob:
        """Run the job to its end; of `best_of` sequences the one with the highest mean log-probability wins."""
        started = time.monotonic()
        with self._metrics.job() as measured:
            self.admission.check_shape(job)
            number = job.best_of or 1
            async with self.admission.admitted(job, number) as admitted:
                measured.admitted(_label(admitted), admitted.sampling.max_new_tokens)
                timings = [Timings(validation_s=admitted.validation_s) for _ in range(number)]
                sequences = await self._all_of(
                    [self._whole_sequence(job, admitted, request_id, one, started) for one in timings]
                )
                longest = max(timings, key=lambda one: one.queue_s + one.inference_s)
                longest.total_s = time.monotonic() - started
                measured.finished([_lengths(sequence.completion) for sequence in sequences], longest)
        best = max(range(number), key=lambda i: sequences[i].mean_logprob)
        return FinishedJob(best=sequences[best], others=sequences[:best] + sequences[best + 1 :], timings=longest)

    async def _all_of(self, runs: list[Coroutine[None, None, FinishedSequence]]) -> list[FinishedSequence]:
        if len(runs) == 1:
            return [await runs[0]]
        try:
            async with asyncio.TaskGroup() as tasks:
                running = [tasks.create_task(run) for run in runs]
        except* LoraplexError as group:
            raise group.exceptions[0] from None
        return [task.result() for task in running]

    async def _whole_sequence(
        self, job: GenerationJob, admitted: AdmittedJob, request_id: str, timings: Timings, started: float
    ) -> FinishedSequence:
        if job.best_of is not None and job.best_of > 1:
            sampling = msgspec.structs.replace(admitted.sampling, seed=new_seed())
            admitted = dataclasses.replace(admitted, sampling=sampling)
        tokens: list[Token] = []
        top_tokens: list[list[Token]] = []
        async with aclosing(self._sequence(job, admitted, request_id, timings, started)) as deltas:
            async for delta in deltas:
                tokens += delta.tokens
                top_tokens += delta.top_tokens
                if delta.completion is not None:
                    return FinishedSequence(completion=delta.completion, tokens=tokens, top_tokens=top_tokens)
        raise IncompleteGeneration("Incomplete generation")

    async def _sequence(
        self, job: GenerationJob, admitted: AdmittedJob, request_id: str, timings: Timings, started: float
    ) -> AsyncGenerator[TextDelta, None]:
        sampling, adapter = admitted.sampling, admitted.adapter
        text = SequenceText(self.tokenizer, admitted.prompt_token_ids, job.stop, sampling)
        submitted = time.monotonic()
        request = GenerateRequest(
            # A client may use its own request id twice; the engine must not see one twice.
            request_id=f"{request_id}#{next(self._numbers)}",
            prompt_token_ids=admitted.prompt_token_ids,
            sampling=sampling,
            adapter_id=adapter.spec.adapter_id if adapter else None,
            adapter_digest=adapter.spec.digest if adapter else None,
            cache_salt=adapter.scope if adapter else None,
            tenant=tenant.get(),
            arrival_time=submitted,
        )
        async with aclosing(self._client.submit(request)) as batches:
            async for outputs in batches:
                delta, error = _feed_all(text, outputs, timings)
                now = time.monotonic()
                if delta.tokens and not timings.first_token_s:
                    timings.first_token_s = now - started
                timings.inference_s = max(now - submitted - timings.queue_s, 0.0)
                if delta.tokens or delta.completion is not None:
                    yield delta
                if error is not None:
                    raise error
                if delta.completion is not None:
                    return
        raise IncompleteGeneration("Incomplete generation")


def _feed_all(
    text: SequenceText, outputs: list[TokenOutput], timings: Timings
) -> tuple[TextDelta, LoraplexError | None]:
    """Everything that waited, as one delta, and the error that came behind it."""
    tokens: list[Token] = []
    top_tokens: list[list[Token]] = []
    prompt_token_ids: list[int] | None = None
    for output in outputs:
        if output.queue_time_s is not None:
            timings.queue_s = output.queue_time_s
        try:
            delta = text.feed(output)
        except LoraplexError as error:
            return TextDelta(tokens=tokens, top_tokens=top_tokens, prompt_token_ids=prompt_token_ids), error
        tokens += delta.tokens
        top_tokens += delta.top_tokens
        prompt_token_ids = prompt_token_ids or delta.prompt_token_ids
        if delta.completion is not None:
            break
    else:
        return TextDelta(tokens=tokens, top_tokens=top_tokens, prompt_token_ids=prompt_token_ids), None
    return dataclasses.replace(delta, tokens=tokens, top_tokens=top_tokens, prompt_token_ids=prompt_token_ids), None


def _label(admitted: AdmittedJob) -> str | None:
    """The name under which the job's adapter is counted; a private one has none of its own."""
    return admitted.adapter.spec.adapter_id if admitted.adapter else None


def _lengths(completion: Completion) -> tuple[int, int]:
    return completion.num_prompt_tokens, completion.num_generated_tokens
