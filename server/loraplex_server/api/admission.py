"""The one door: GenerationJob → AdmittedJob with a checked prompt and sampling, or a refusal; holds the permits.

The order of the checks, their bounds and their messages are TGI's.
"""

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass

import msgspec

from loraplex_server.api.adapter_finder import AdapterFinder
from loraplex_server.api.found_adapter import FoundAdapter
from loraplex_server.api.job import GenerationJob
from loraplex_server.config import ApiConfig
from loraplex_server.errors import InvalidRequest, Overloaded
from loraplex_server.messages import EngineReady, SamplingParams
from loraplex_server.text.bad_words import bad_word_tokens
from loraplex_server.text.guides import Guide
from loraplex_server.text.tokenizer import Tokenizer

# Compiles a guide to the grammar that the engine takes; raises InvalidRequest.
GuideCheck = Callable[[Guide], Awaitable[str]]

# What `max_new_tokens` counts for, at most, in the check of prompt + output: TGI grants output in such chunks, so a
# request that asks for more than fits is accepted and ends with "length".
TOKEN_CHUNK = 1024
# Below it scores divided by the temperature leave float32's range; drawing is already the same as taking the best.
MIN_TEMPERATURE = 1e-4
# Looking for a stop string costs its length with every token.
MAX_STOP_LENGTH = 1_024


@dataclass(frozen=True, slots=True, kw_only=True)
class AdmittedJob:
    """A job that passed every check."""

    prompt_token_ids: list[int]
    sampling: SamplingParams
    adapter: FoundAdapter | None
    validation_s: float


class Admission:
    """Checks jobs against the server's limits and counts those in flight."""

    def __init__(
        self,
        config: ApiConfig,
        limits: EngineReady,
        tokenizer: Tokenizer,
        finder: AdapterFinder,
        *,
        prefill_logprobs: bool,
        check_guide: GuideCheck | None = None,
    ):
        self._config = config
        self._limits = limits
        self._tokenizer = tokenizer
        self._finder = finder
        self._prefill_logprobs = prefill_logprobs
        self._check_guide = check_guide
        self._num_permits_taken = 0

    @property
    def num_permits_taken(self) -> int:
        """Sequences admitted and not yet ended."""
        return self._num_permits_taken

    def check_shape(self, job: GenerationJob) -> None:
        """What is refused before a permit is asked for: how many answers, and what cannot be streamed."""
        best_of = 1 if job.best_of is None else job.best_of
        max_best_of = self._config.max_best_of
        if job.stream:
            if best_of != 1:
                raise InvalidRequest("`best_of` != 1 is not supported when streaming tokens")
            if job.prompt_logprobs:
                raise InvalidRequest("`decoder_input_details` == true is not supported when streaming tokens")
        elif max_best_of == 1 and best_of != 1:
            raise InvalidRequest("`best_of` != 1 is not allowed for this endpoint")
        elif not 0 < best_of <= max_best_of:
            raise InvalidRequest(f"`best_of` must be > 0 and <= {max_best_of}. Given: {best_of}")

    @contextmanager
    def permits(self, number: int) -> Iterator[None]:
        """Hold `number` of the server's permits, or be refused at once: there is no queue above the limit."""
        if self._num_permits_taken + number > self._config.max_concurrent_requests:
            raise Overloaded("Model is overloaded")
        self._num_permits_taken += number
        try:
            yield
        finally:
            self._num_permits_taken -= number

    @asynccontextmanager
    async def admitted(self, job: GenerationJob, number: int) -> AsyncIterator[AdmittedJob]:
        """The job, checked, with its adapter kept for it and `number` permits, until the block ends.

        An adapter that is not here is fetched first, which takes no permit.
        """
        if not job.adapter_id and job.merge is None:
            with self.permits(number):
                yield await self.admit(job, None)
            return
        self._check_fields(job)  # nothing is fetched for a job that will be refused
        if job.merge is not None:
            found = self._finder.merges.held(job.merge, job.adapter_access)
        else:
            found = self._finder.held(job.adapter_id or "", job.adapter_access)
        async with found as adapter:
            with self.permits(number):
                yield await self.admit(job, adapter)

    async def admit(self, job: GenerationJob, adapter: FoundAdapter | None) -> AdmittedJob:
        """Check everything else and tokenise the prompt."""
        started = time.monotonic()
        self._check_fields(job)
        token_ids = await self._tokenise(job)
        max_new_tokens = self._grant(job, len(token_ids))
        grammar = None if job.guide is None else await self.grammar(job.guide)
        sampling = self._sampling(job, max_new_tokens, grammar)
        if job.min_new_tokens or job.allowed_token_ids or job.bad_words:
            sampling = await self._with_bans(job, sampling)
        return AdmittedJob(
            prompt_token_ids=token_ids,
            sampling=sampling,
            adapter=adapter,
            validation_s=time.monotonic() - started,
        )

    async def _with_bans(self, job: GenerationJob, sampling: SamplingParams) -> SamplingParams:
        if job.min_new_tokens > sampling.max_new_tokens:
            raise InvalidRequest(
                f"`min_tokens` must be at most `max_tokens` and what fits, {sampling.max_new_tokens}. "
                f"Given: {job.min_new_tokens}"
            )
        words = await asyncio.to_thread(bad_word_tokens, job.bad_words, self._tokenizer) if job.bad_words else ()
        return msgspec.structs.replace(
            sampling,
            min_new_tokens=job.min_new_tokens,
            held_back_token_ids=(*self._limits.end_token_ids, *job.stop_token_ids) if job.min_new_tokens else (),
            allowed_token_ids=job.allowed_token_ids,
            bad_words=words,
        )

    async def grammar(self, guide: Guide) -> str:
        """The grammar of a guide. Raises InvalidRequest for one that does not compile, or if none are served."""
        if self._check_guide is None:
            raise InvalidRequest("grammar is not supported")
        return await self._check_guide(guide)

    def _check_fields(self, job: GenerationJob) -> None:
        several = job.best_of is not None and job.best_of > 1
        if several and not job.samples:
            raise InvalidRequest("you must use sampling when `best_of` is > 1")
        if job.temperature is not None and job.temperature <= 0:
            raise InvalidRequest("`temperature` must be strictly positive, or 0 for the most likely tokens")
        if job.repetition_penalty is not None and job.repetition_penalty <= 0:
            raise InvalidRequest("`repetition_penalty` must be strictly positive")
        if job.frequency_penalty is not None and not -2 <= job.frequency_penalty <= 2:
            raise InvalidRequest("`frequency_penalty` must be >= -2.0 and <= 2.0")
        if job.presence_penalty is not None and not -2 <= job.presence_penalty <= 2:
            raise InvalidRequest("`presence_penalty` must be >= -2.0 and <= 2.0")
        if job.top_p is not None and not 0 < job.top_p < 1:
            raise InvalidRequest("`top_p` must be > 0.0 and <= 1.0")
        if job.typical_p is not None and not 0 < job.typical_p < 1:
            raise InvalidRequest("`typical_p` must be > 0.0 and <= 1.0")
        if job.top_k is not None and job.top_k <= 0:
            raise InvalidRequest("`top_k` must be strictly positive")
        if job.min_p is not None and not 0 <= job.min_p <= 1:
            raise InvalidRequest("`min_p` must be >= 0.0 and <= 1.0")
        if job.count_penalty is not None and not -2 <= job.count_penalty <= 2:
            raise InvalidRequest("`frequency_penalty` must be >= -2.0 and <= 2.0")
        if job.max_new_tokens == 0:
            raise InvalidRequest("`max_new_tokens` must be strictly positive")
        if job.guide is not None:
            for name, value in (("ignore_eos", job.ignore_eos), ("min_tokens", job.min_new_tokens),
                                ("allowed_token_ids", job.allowed_token_ids)):  # fmt: skip
                if value:
                    raise InvalidRequest(f"`{name}` cannot be used with a grammar, which says what may come and when")
        self._check_stop(job.stop)
        if job.stop_token_ids:
            self._check_vocabulary("`stop_token_ids`", job.stop_token_ids)
        if job.allowed_token_ids:
            self._check_vocabulary("`allowed_token_ids`", job.allowed_token_ids)
        if job.guide is not None and (job.min_new_tokens or job.allowed_token_ids):
            raise InvalidRequest("`min_tokens` and `allowed_token_ids` cannot be used with a grammar, which may need "
                                 "other tokens")  # fmt: skip
        if job.logit_bias:
            self._check_vocabulary("`logit_bias`", job.logit_bias)
        if several and job.seed is not None:
            raise InvalidRequest("`seed` must not be set when `best_of` > 1")
        max_top_n = self._config.max_top_n_tokens
        if job.top_n_tokens is not None and job.top_n_tokens > max_top_n:
            raise InvalidRequest(f"`top_n_tokens` must be >= 0 and <= {max_top_n}. Given: {job.top_n_tokens}")
        if not (job.prompt or job.prompt_token_ids):
            raise InvalidRequest("`inputs` cannot be empty")
        max_input = self._limits.max_input_tokens
        if job.truncate is not None and not 0 < job.truncate <= max_input:
            raise InvalidRequest(
                f"`truncate` must be strictly positive and less than {max_input}. Given: {job.truncate}"
            )

    def _check_stop(self, stop: tuple[str, ...]) -> None:
        if len(stop) > self._config.max_stop_sequences:
            raise InvalidRequest(
                f"`stop` supports up to {self._config.max_stop_sequences} stop sequences. Given: {len(stop)}"
            )
        for text in stop:
            if not text:
                raise InvalidRequest("`stop` must not contain an empty string")
            if len(text) > MAX_STOP_LENGTH:
                raise InvalidRequest(
                    f"a `stop` sequence must have at most {MAX_STOP_LENGTH} characters. Given: {len(text)}"
                )

    async def _tokenise(self, job: GenerationJob) -> list[int]:
        if job.prompt_token_ids is None:
            token_ids = await self._tokenizer.encode_async(job.prompt, job.add_special_tokens)
        else:
            token_ids = list(job.prompt_token_ids)
            self._check_vocabulary("the prompt", token_ids)
        if job.truncates_to_fit:
            return token_ids[-self._limits.max_input_tokens :]
        return token_ids if job.truncate is None else token_ids[-job.truncate :]

    def _check_vocabulary(self, what: str, token_ids: Iterable[int]) -> None:
        vocab_size = self._limits.vocab_size
        for token_id in token_ids:
            if not 0 <= token_id < vocab_size:
                raise InvalidRequest(f"{what} has the token id {token_id}; the model's are from 0 to {vocab_size - 1}")

    def _grant(self, job: GenerationJob, num_prompt_tokens: int) -> int:
        """How many tokens the job may generate: what it asks for, as far as the server's limit leaves room."""
        max_input, max_total = self._limits.max_input_tokens, self._limits.max_total_tokens
        room = max(max_total - num_prompt_tokens, 0)
        asked = room if job.max_new_tokens is None else job.max_new_tokens
        if num_prompt_tokens + min(asked, TOKEN_CHUNK) > max_total:
            raise InvalidRequest(
                f"`inputs` tokens + `max_new_tokens` must be <= {max_total}. "
                f"Given: {num_prompt_tokens} `inputs` tokens and {asked} `max_new_tokens`"
            )
        if num_prompt_tokens > max_input:
            raise InvalidRequest(f"`inputs` must have less than {max_input} tokens. Given: {num_prompt_tokens}")
        return min(asked, room)

    def _sampling(self, job: GenerationJob, max_new_tokens: int, grammar: str | None) -> SamplingParams:
        temperature = 1.0 if job.temperature is None else job.temperature
        return SamplingParams(
            max_new_tokens=max_new_tokens,
            do_sample=job.samples,
            temperature=max(temperature, MIN_TEMPERATURE),
            top_k=job.top_k or 0,
            top_p=1.0 if job.top_p is None else job.top_p,
            typical_p=1.0 if job.typical_p is None else job.typical_p,
            repetition_penalty=1.0 if job.repetition_penalty is None else job.repetition_penalty,
            frequency_penalty=job.frequency_penalty or 0.0,
            presence_penalty=job.presence_penalty or 0.0,
            count_penalty=job.count_penalty or 0.0,
            min_p=job.min_p or 0.0,
            logit_bias=job.logit_bias or {},
            stop_token_ids=job.stop_token_ids,
            watermark=job.watermark,
            seed=new_seed() if job.seed is None else job.seed,
            ignore_eos=job.ignore_eos,
            guide=grammar,
            num_logprobs=job.top_n_tokens or job.num_top_logprobs,
            num_prompt_logprobs=job.num_prompt_logprobs if job.echo_logprobs else 0,
            prompt_logprobs=job.echo_logprobs or (job.prompt_logprobs and self._prefill_logprobs),
        )


def new_seed() -> int:
    """A seed for a request that names none."""
    return secrets.randbits(64)
