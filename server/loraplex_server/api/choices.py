"""Several answers at once: jobs that run side by side and end together, and the text that each choice shows."""

import asyncio
import dataclasses
from collections.abc import AsyncGenerator, Container, Sequence
from contextlib import aclosing
from typing import Literal

from loraplex_server.api.generation import Generator
from loraplex_server.api.job import FinishedJob, GenerationJob, TextDelta
from loraplex_server.errors import LoraplexError
from loraplex_server.text.stop_text import StopTextFilter

ChoiceReason = Literal["stop", "length"]
IndexedDelta = tuple[int, TextDelta]

# How long a stream's status waits for what the first delta tells. Refusals come within milliseconds.
REFUSAL_WAIT_S = 1.0
# Deltas of all choices that wait for the reader; the engine's client bounds what waits behind them.
MAX_WAITING_DELTAS = 64


def repeated(job: GenerationJob, number: int) -> list[GenerationJob]:
    """The job `number` times, each with its own seed, all of them repeatable if the job is."""
    if job.seed is None or number == 1:
        return [job] * number
    return [dataclasses.replace(job, seed=(job.seed + i) % 2**64) for i in range(number)]


async def complete_all(generator: Generator, jobs: Sequence[GenerationJob], request_id: str) -> list[FinishedJob]:
    """Run jobs to their ends, side by side; the first failure ends them all."""
    if len(jobs) == 1:
        return [await generator.complete(jobs[0], request_id)]
    try:
        async with asyncio.TaskGroup() as tasks:
            running = [tasks.create_task(generator.complete(job, request_id)) for job in jobs]
    except* LoraplexError as group:
        raise group.exceptions[0] from None
    return [task.result() for task in running]


async def stream_all(
    generator: Generator, jobs: Sequence[GenerationJob], request_id: str
) -> AsyncGenerator[IndexedDelta, None]:
    """Yield the deltas of all jobs with the jobs' numbers, as they come; the first failure ends them all."""
    if len(jobs) == 1:
        async with aclosing(generator.stream(jobs[0], request_id)) as deltas:
            async for delta in deltas:
                yield 0, delta
        return
    waiting: asyncio.Queue[IndexedDelta | Exception] = asyncio.Queue(MAX_WAITING_DELTAS)

    async def run(index: int, job: GenerationJob) -> None:
        try:
            async with aclosing(generator.stream(job, request_id)) as deltas:
                async for delta in deltas:
                    await waiting.put((index, delta))
        except Exception as error:  # raised again by the reader
            await waiting.put(error)

    running = [asyncio.create_task(run(index, job)) for index, job in enumerate(jobs)]
    num_running = len(running)
    try:
        while num_running:
            got = await waiting.get()
            if isinstance(got, Exception):
                raise got
            num_running -= got[1].completion is not None
            yield got
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)


async def begin(stream: AsyncGenerator[IndexedDelta, None]) -> AsyncGenerator[IndexedDelta, None]:
    """The same stream, begun: what refuses it at once is raised here, while a status can still be chosen."""
    first = asyncio.ensure_future(anext(stream))
    try:
        await asyncio.wait((first,), timeout=REFUSAL_WAIT_S)
    except asyncio.CancelledError:
        first.cancel()
        raise
    if first.done():
        first.result()
    return _go_on(first, stream)


async def _go_on(
    first: asyncio.Future[IndexedDelta], stream: AsyncGenerator[IndexedDelta, None]
) -> AsyncGenerator[IndexedDelta, None]:
    async with aclosing(stream):
        yield await first
        async for delta in stream:
            yield delta


class ChoiceText:
    """What one choice shows: no stop string that ended it, and no special tokens unless they are asked for.

    Those that are spelt as one of `markers` are shown all the same.
    """

    def __init__(
        self, stop: Sequence[str], *, keeps_stop: bool, shows_special: bool, markers: Container[str] = frozenset()
    ):
        self._filter = StopTextFilter(() if keeps_stop else stop)
        self._shows_special = shows_special
        self._markers = markers

    def feed(self, delta: TextDelta) -> tuple[list[str], ChoiceReason | None]:
        """A text for each token of the delta, and why the choice ended if it did."""
        end = delta.completion
        pieces: list[str] = []
        last = len(delta.tokens) - 1
        for i, token in enumerate(delta.tokens):
            is_end = i == last and end is not None and end.finish_reason == "eos_token"
            is_hidden = token.special and (is_end or not (self._shows_special or token.text in self._markers))
            pieces.append(self._filter.feed("" if is_hidden else token.text))
        if end is None:
            return pieces, None
        rest, was_stopped = self._filter.end()
        pieces[-1] += rest
        return pieces, "length" if end.finish_reason == "length" and not was_stopped else "stop"
