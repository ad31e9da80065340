"""`LLM`: the engine in this process, batches of prompts in, texts out, as vLLM's users write it."""

import random
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Never, Self

import msgspec
from tqdm import tqdm

from loraplex.completion import OpenCompletion
from loraplex.generation_defaults import read_generation_defaults
from loraplex.launch_error import LaunchError
from loraplex.llm_arguments import read_arguments
from loraplex.lora_request import LoRARequest
from loraplex.offline_adapters import OfflineAdapters
from loraplex.offline_engine import Job, OfflineEngine
from loraplex.outputs import RequestOutput
from loraplex.prompts import Prompt, PromptType, read_conversations, read_prompts
from loraplex.sampling_params import SamplingParams
from loraplex_server import messages
from loraplex_server.errors import InvalidRequest, ToolFailed
from loraplex_server.messages import AdapterSpec, GenerateRequest
from loraplex_server.text.bad_words import bad_word_tokens
from loraplex_server.text.chat_template import ChatTemplate, Conversation
from loraplex_server.text.tokenizer import Tokenizer, TokenizerError
from loraplex_server.text.tool_fields import read_tools

OWN_ARGUMENTS = ("tokenizer", "enable_lora", "generation_config", "max_logprobs", "seed")
SEED_BITS = 64

ParamsOf = SamplingParams | Sequence[SamplingParams] | None
LoRAOf = LoRARequest | Sequence[LoRARequest | None] | None


@dataclass(slots=True, kw_only=True)
class OpenRequest:
    """One prompt, checked, and the sequences that are generated for it."""

    request_id: str
    prompt: Prompt
    token_ids: list[int]
    params: SamplingParams
    lora_request: LoRARequest | None
    adapter: AdapterSpec | None
    grammar: str | None
    jobs: list[Job] = field(default_factory=list)


class LLM:
    """One base model with any number of adapters, in the caller's process.

    Takes vLLM's arguments and the settings of the engine (docs/settings.md) by name; those of vLLM's that have no
    meaning here are named in one warning. `generate` and `chat` may be called from several threads: one at a time is
    served. Raises LaunchError when the model cannot be served, TypeError and ValueError for its arguments.
    """

    def __init__(
        self,
        model: str,
        *,
        tokenizer: str | None = None,
        enable_lora: bool = True,
        generation_config: str = "auto",
        max_logprobs: int = 20,
        seed: int | None = 0,
        **arguments: Any,
    ):
        settings = read_arguments(str(model), arguments, OWN_ARGUMENTS)
        self._engine = OfflineEngine(settings)
        config = self._engine.config
        self._text_folder = str(tokenizer or config.model_path)
        try:
            self._tokenizer = Tokenizer.load(self._text_folder, num_threads=1)
            defaults = {} if generation_config == "vllm" else read_generation_defaults(Path(config.model_path))
        except (TokenizerError, ValueError) as error:
            self._engine.close()
            raise LaunchError(str(error)) from None
        launch = settings.launch
        hub_access = {
            "cache_dir": launch.huggingface_hub_cache,
            "token": launch.hub_token,
            "endpoint": launch.hub_endpoint,
            "offline": launch.hub_offline,
        }
        self._adapters = OfflineAdapters(
            self._engine.model_config,
            max_rank=config.adapters.max_lora_rank,
            base_model_name=launch.model_id,
            hub_access=hub_access,
        )
        self._enable_lora = enable_lora
        self._max_logprobs = max_logprobs
        self._defaults = defaults
        self._seeds = random.Random(seed)
        self._num_requests = 0
        self._lock = threading.Lock()
        self._is_closed = False

    def generate(
        self,
        prompts: PromptType | Sequence[PromptType],
        sampling_params: ParamsOf = None,
        *,
        use_tqdm: bool | Callable[..., Any] = True,
        lora_request: LoRAOf = None,
    ) -> list[RequestOutput]:
        """The answers to all prompts, in their order.

        `sampling_params` and `lora_request` are one for all prompts, or a list with one for each; None is the model's
        own defaults, and the base. Everything is checked before anything is generated: ValueError or TypeError for
        what is out of bounds, AdapterError (of loraplex_server.errors) for an adapter that cannot be served.
        """
        return self._run(read_prompts(prompts), True, sampling_params, lora_request, use_tqdm)

    def chat(
        self,
        messages: Sequence[Any],
        sampling_params: ParamsOf = None,
        use_tqdm: bool | Callable[..., Any] = True,
        lora_request: LoRAOf = None,
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: list[dict[str, Any]] | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """`generate` for one conversation or a list of them, written out by the model's chat template.

        Raises TemplateFailed (of loraplex_server.errors) with the template's own words.
        """
        template = self._chat_template
        if template is None:
            raise ValueError("this model has no chat template: write the prompt yourself and use generate")
        if continue_final_message and add_generation_prompt:
            raise ValueError("continue_final_message needs add_generation_prompt=False")
        try:
            known_tools = read_tools(tools or ())
        except ToolFailed as error:
            raise ValueError(str(error)) from None
        prompts = [
            Prompt(
                template.render(
                    Conversation(
                        messages=conversation,
                        add_generation_prompt=add_generation_prompt,
                        continue_final_message=continue_final_message,
                        variables=chat_template_kwargs or {},
                        tools=known_tools,
                    )
                )
            )
            for conversation in read_conversations(messages)
        ]
        # The template writes the special tokens itself.
        return self._run(prompts, False, sampling_params, lora_request, use_tqdm)

    def encode(self, *args: Any, **kwargs: Any) -> Never:
        """Refused: in vLLM this is for pooling models."""
        raise NotImplementedError(
            "encode is for pooling models, which are not served; token ids of a text come from get_tokenizer().encode"
        )

    def get_tokenizer(self) -> Tokenizer:
        """The model's tokenizer: `encode(text)` gives token ids, `decode(token_ids)` the text."""
        return self._tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """What is used where no sampling_params are given: the defaults of the model's generation_config.json."""
        return SamplingParams(**self._defaults)

    @cached_property
    def _chat_template(self) -> ChatTemplate | None:
        return ChatTemplate.load(self._text_folder)

    @property
    def engine(self) -> OfflineEngine:
        """What generates; for `LLMEngine`, which steps it by itself."""
        return self._engine

    def open_request(self, prompt: PromptType, params: SamplingParams, lora_request: LoRARequest | None) -> OpenRequest:
        """One prompt, checked as `generate` does, with the sequences that the engine is to be given."""
        (one,) = read_prompts(prompt)
        request = self._admit(one, True, params, lora_request)
        request.jobs = self._jobs(request)
        return request

    def close(self) -> None:
        """End the threads; nothing can be generated any more."""
        with self._lock:
            if not self._is_closed:
                self._is_closed = True
                self._engine.close()
                self._tokenizer.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _run(
        self,
        prompts: list[Prompt],
        add_special_tokens: bool,
        sampling_params: ParamsOf,
        lora_request: LoRAOf,
        use_tqdm: bool | Callable[..., Any],
    ) -> list[RequestOutput]:
        if sampling_params is None:
            sampling_params = self.get_default_sampling_params()
        params = _one_each("sampling_params", sampling_params, len(prompts))
        lora_requests = _one_each("lora_request", lora_request, len(prompts))
        with self._lock:
            if self._is_closed:
                raise RuntimeError("this LLM has been closed")
            requests = [
                self._admit(prompt, add_special_tokens, one, lora)
                for prompt, one, lora in zip(prompts, params, lora_requests, strict=True)
            ]
            for request in requests:
                request.jobs = self._jobs(request)
            self._generate(requests, use_tqdm)
        outputs = [self.output_of(request) for request in requests]
        for output in outputs:
            for completion in output.outputs:
                if completion.error is not None:
                    message = f"request {output.request_id} failed: {completion.error}"
                    warnings.warn(message, RuntimeWarning, stacklevel=3)
        return outputs

    def _generate(self, requests: list[OpenRequest], use_tqdm: bool | Callable[..., Any]) -> None:
        jobs = [job for request in requests for job in request.jobs]
        if not use_tqdm:
            self._engine.run(jobs, lambda _: None)
            return
        new_bar = use_tqdm if callable(use_tqdm) else tqdm
        with new_bar(total=len(jobs), desc="Processed prompts", dynamic_ncols=True) as bar:
            self._engine.run(jobs, lambda _: bar.update(1))

    def _admit(
        self, prompt: Prompt, add_special_tokens: bool, params: SamplingParams, lora_request: LoRARequest | None
    ) -> OpenRequest:
        params.check()
        self._check_vocabulary("stop_token_ids", params.stop_token_ids or ())
        self._check_vocabulary("allowed_token_ids", params.allowed_token_ids or ())
        self._check_vocabulary("logit_bias", params.logit_bias or ())
        self._check_number("logprobs", params.logprobs)
        self._check_number("prompt_logprobs", params.prompt_logprobs)
        if lora_request is not None and not self._enable_lora:
            raise ValueError(f"adapter '{lora_request.lora_name}' was asked for, but LLM has enable_lora=False")
        token_ids = self._token_ids(prompt, add_special_tokens)
        longest = self._engine.limits.max_input_tokens
        if not 1 <= len(token_ids) <= longest:
            raise ValueError(f"a prompt must have 1 to {longest} tokens (max_model_len). Given: {len(token_ids)}")
        self._num_requests += 1
        return OpenRequest(
            request_id=str(self._num_requests - 1),
            prompt=prompt,
            token_ids=token_ids,
            params=params,
            lora_request=lora_request,
            adapter=self._adapters.resolve(lora_request) if lora_request else None,
            grammar=None if params.guide is None else self._engine.grammar_of(params.guide),
        )

    def _token_ids(self, prompt: Prompt, add_special_tokens: bool) -> list[int]:
        if prompt.token_ids is not None:
            self._check_vocabulary("prompt_token_ids", prompt.token_ids)
            return prompt.token_ids
        try:
            return self._tokenizer.encode(prompt.text or "", add_special_tokens)
        except InvalidRequest as error:
            raise ValueError(str(error)) from None

    def _check_vocabulary(self, name: str, token_ids: Any) -> None:
        size = self._engine.model_config.vocab_size
        for token_id in token_ids:
            if not isinstance(token_id, int) or not 0 <= token_id < size:
                raise ValueError(f"{name}: {token_id!r} is not in the vocabulary of {size} tokens")

    def _check_number(self, name: str, number: int | None) -> None:
        most = self._max_logprobs
        if number is not None and most != -1 and not 0 <= number <= most:
            raise ValueError(f"{name} must be 0 to {most}, or LLM(max_logprobs=…) raised. Given: {number}")

    def _jobs(self, request: OpenRequest) -> list[Job]:
        params, limits = request.params, self._engine.limits
        room = limits.max_total_tokens - len(request.token_ids)
        sampling = params.for_engine(
            max_new_tokens=min(params.max_tokens or room, room),
            vocab_size=self._engine.model_config.vocab_size,
            seed=0,
            grammar=request.grammar,
        )
        sampling = self._with_bans(params, sampling)
        jobs = []
        for index in range(params.num_sequences):
            seed = self._seeds.getrandbits(SEED_BITS) if params.seed is None else (params.seed + index) % 2**SEED_BITS
            jobs.append(
                Job(
                    GenerateRequest(
                        request_id=f"{request.request_id}#{index}",
                        prompt_token_ids=request.token_ids,
                        sampling=msgspec.structs.replace(sampling, seed=seed),
                        adapter_id=request.adapter.adapter_id if request.adapter else None,
                        adapter_digest=request.adapter.digest if request.adapter else None,
                        arrival_time=time.monotonic(),
                    ),
                    request.adapter,
                    OpenCompletion(
                        self._tokenizer,
                        request.token_ids,
                        params,
                        frozenset(self._engine.model_config.end_token_ids),
                    ),
                )
            )
        return jobs

    def _with_bans(self, params: SamplingParams, sampling: messages.SamplingParams) -> messages.SamplingParams:
        ends = (*self._engine.model_config.end_token_ids, *sampling.stop_token_ids)
        return msgspec.structs.replace(
            sampling,
            min_new_tokens=min(params.min_tokens, sampling.max_new_tokens),
            held_back_token_ids=ends if params.min_tokens else (),
            allowed_token_ids=tuple(params.allowed_token_ids or ()),
            bad_words=bad_word_tokens(params.bad_words or (), self._tokenizer),
        )

    def output_of(self, request: OpenRequest) -> RequestOutput:
        """What was generated for a request whose sequences have all ended."""
        jobs = request.jobs
        if request.params.best_of is not None:
            jobs = sorted(jobs, key=lambda job: -job.completion.cumulative_logprob)
        outputs = [
            job.completion.result(index, request.lora_request) for index, job in enumerate(jobs[: request.params.n])
        ]
        return RequestOutput(
            request_id=request.request_id,
            prompt=request.prompt.text,
            prompt_token_ids=request.token_ids,
            prompt_logprobs=request.jobs[0].completion.prompt_logprobs,
            outputs=outputs,
            finished=True,
            lora_request=request.lora_request,
            num_cached_tokens=max(job.completion.num_cached_tokens for job in request.jobs),
        )


def _one_each(name: str, given: Any, number: int) -> list[Any]:
    """`given` for each of `number` prompts: a list as it is, anything else repeated."""
    if not isinstance(given, list | tuple):
        return [given] * number
    if len(given) != number:
        raise ValueError(f"{name} must be one, or a list with one for each of {number} prompts. Given: {len(given)}")
    return [*given]
