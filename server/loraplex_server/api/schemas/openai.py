"""Request bodies of OpenAI's routes, with the fields that vLLM's and TGI's clients add → GenerationJob."""

import dataclasses
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, StrictInt, StrictStr

from loraplex_server.api.job import AdapterAccess, GenerationJob
from loraplex_server.api.schemas.merged_adapters import MergedAdapters, wanted_merge
from loraplex_server.api.schemas.structure import format_guide, older_vllm_guides, only_one, structured_guide
from loraplex_server.api.schemas.tgi import Float32, Int32, UInt32
from loraplex_server.api.schemas.vllm_fields import VllmFields
from loraplex_server.errors import InvalidRequest, ToolFailed
from loraplex_server.text.chat_template import Conversation
from loraplex_server.text.guides import Guide
from loraplex_server.text.tool_fields import check_tool_messages, read_tool_use
from loraplex_server.text.tool_prompt import Message
from loraplex_server.text.tools import ToolUse

MAX_TOP_LOGPROBS = 20
MAX_LOGIT_BIAS = 1_024
DEFAULT_COMPLETION_TOKENS = 16
ALL_THAT_FITS = -1  # of `truncate_prompt_tokens`


class _Body(BaseModel):
    # Strict: "1" is no number. Unknown fields are ignored: OpenAI's clients send many that change nothing here.
    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)


class StreamOptions(_Body):
    """What a stream tells beside the text."""

    include_usage: bool | None = Field(None, description="one more chunk at the end, with the counts of tokens")
    continuous_usage_stats: bool | None = Field(None, description="the counts so far in every chunk")


class _GenerationBody(VllmFields):
    """What chat and completions have in common. Every field may be null, which is the same as leaving it out."""

    model: str | None = Field(None, description="the base model, an adapter, or base:adapter", examples=["pirate"])
    adapter_id: str | None = Field(None, description="LoRA adapter to answer with, when `model` is the base")
    adapter_source: str | None = Field(None, description="where an unknown adapter comes from: hub, local, s3 or pbase")
    api_token: str | None = Field(None, description="token for the adapter's source")
    merged_adapters: MergedAdapters | None = Field(None, description="several adapters to answer with as one")
    user: Any = Field(None, description="a text; requests of the same one get the same version of a split adapter")
    max_tokens: UInt32 | None = Field(None, description="most tokens to generate", examples=[64])
    temperature: Float32 | None = Field(None, description=">= 0; 0 takes the most likely tokens; 1 when absent")
    top_p: Float32 | None = Field(None, description="> 0 and <= 1; draw among the most likely tokens of this mass")
    top_k: Int32 | None = Field(None, description="draw among the k most likely tokens; 0 or -1 for all")
    min_p: Float32 | None = Field(None, description="0 to 1; draw among tokens at least so likely as this share of "
                                  "the likeliest")  # fmt: skip
    typical_p: Float32 | None = Field(None, description="> 0 and <= 1; locally typical sampling")
    n: Int32 | None = Field(None, description="answers to draw")
    seed: StrictInt | None = Field(None, ge=-(2**63), le=2**64 - 1, description="makes the draw repeatable")
    stop: StrictStr | list[StrictStr] | None = Field(None, description="texts that end the answer, not part of it")
    stop_token_ids: list[StrictInt] | None = Field(None, description="tokens that end the answer")
    include_stop_str_in_output: bool | None = Field(None, description="leave the stop text in the answer")
    ignore_eos: bool | None = Field(None, description="go on after the end token")
    skip_special_tokens: bool | None = Field(None, description="false shows special tokens in the text")
    frequency_penalty: Float32 | None = Field(None, description="-2 to 2; times how often a token was generated")
    presence_penalty: Float32 | None = Field(None, description="-2 to 2; for tokens that were generated at all")
    repetition_penalty: Float32 | None = Field(None, description="> 0; above 1 discourages tokens already seen")
    logit_bias: dict[str, float] | list[float] | None = Field(None, description="token id → -100 to 100, added to "
                                                              "its score")  # fmt: skip
    stream: bool | None = Field(None, description="answer with server-sent events")
    stream_options: StreamOptions | None = None
    truncate_prompt_tokens: Int32 | None = Field(None, description="keep only the last so many tokens of the prompt")
    response_format: dict[str, Any] | None = Field(None, description="what the text must be: type text, json_object "
                                                   "or json_schema; also TGI's and LoRAX's forms")  # fmt: skip
    structured_outputs: dict[str, Any] | None = Field(None, description="what the text must be: one of json, regex, "
                                                      "choice, grammar, json_object")  # fmt: skip
    guided_json: Any = Field(None, description="JSON schema that the text must satisfy")
    guided_regex: Any = Field(None, description="regular expression that the text must match")
    guided_choice: Any = Field(None, description="texts, one of which is the answer")
    guided_grammar: Any = Field(None, description="grammar of the text, in Lark's notation or GBNF")
    guided_whitespace_pattern: str | None = Field(None, description="white space in JSON, a regular expression")

    @property
    def wants_usage_chunk(self) -> bool:
        """Whether a stream ends with the counts of tokens."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def adapter_access(self) -> AdapterAccess:
        """How the adapter is to be had."""
        user = self.user if isinstance(self.user, str) else ""
        return AdapterAccess(source=self.adapter_source or None, token=self.api_token or None, split_key=user)

    @property
    def wants_running_usage(self) -> bool:
        """Whether every chunk of a stream has the counts so far."""
        return self.stream_options is not None and bool(self.stream_options.continuous_usage_stats)

    @property
    def adapter_name(self) -> str | None:
        """The adapter that a field beside `model` names."""
        if self.adapter_id and self.lora_path and self.adapter_id != self.lora_path:
            raise InvalidRequest("`adapter_id` and `lora_path` name different adapters")
        return self.adapter_id or self.lora_path

    @property
    def num_choices(self) -> int:
        """How many answers a prompt gets."""
        return 1 if self.n is None else self.n

    @property
    def stop_texts(self) -> tuple[str, ...]:
        """The texts that end an answer."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    def check(self, max_choices: int) -> None:
        """Refuse what is out of bounds in this dialect alone, and what is not served."""
        if not 1 <= self.num_choices <= max_choices:
            raise InvalidRequest(f"`n` must be from 1 to {max_choices}. Given: {self.num_choices}")
        if self.temperature is not None and self.temperature < 0:
            raise InvalidRequest("`temperature` must be >= 0.0")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise InvalidRequest("`top_p` must be > 0.0 and <= 1.0")
        if self.top_k is not None and self.top_k < -1:
            raise InvalidRequest("`top_k` must be >= -1; 0 and -1 keep all tokens")
        if self.typical_p is not None and not 0 < self.typical_p <= 1:
            raise InvalidRequest("`typical_p` must be > 0.0 and <= 1.0")
        truncate = self.truncate_prompt_tokens
        if truncate is not None and truncate < 1 and truncate != ALL_THAT_FITS:
            raise InvalidRequest("`truncate_prompt_tokens` must be >= 1, or -1 for as many as the server takes")
        self.check_vllm_fields(is_stream=bool(self.stream), max_logprobs=MAX_TOP_LOGPROBS)

    def _job(self, prompt: str, adapter_id: str | None, max_new_tokens: int | None) -> GenerationJob:
        # What shapes a draw means nothing without one.
        is_greedy = self.temperature == 0
        return GenerationJob(
            prompt=prompt,
            adapter_id=adapter_id,
            merge=wanted_merge(adapter_id, self.merged_adapters),
            adapter_access=self.adapter_access,
            stream=bool(self.stream),
            max_new_tokens=max_new_tokens,
            do_sample=not is_greedy,
            temperature=None if is_greedy else self.temperature,
            top_k=None if is_greedy or self.top_k in (0, -1) else self.top_k,
            top_p=None if is_greedy or self.top_p == 1 else self.top_p,
            typical_p=None if is_greedy or self.typical_p == 1 else self.typical_p,
            min_p=None if is_greedy else self.min_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            count_penalty=self.frequency_penalty,
            logit_bias=self._bias_by_token(),
            # Seeds are signed here.
            seed=None if self.seed is None else self.seed % 2**64,
            stop=self.stop_texts,
            stop_token_ids=tuple(self.stop_token_ids or ()),
            ignore_eos=bool(self.ignore_eos),
            min_new_tokens=self.min_tokens or 0,
            allowed_token_ids=tuple(self.allowed_token_ids or ()),
            bad_words=tuple(self.bad_words or ()),
            truncate=None if self.truncate_prompt_tokens == ALL_THAT_FITS else self.truncate_prompt_tokens,
            truncates_to_fit=self.truncate_prompt_tokens == ALL_THAT_FITS,
            echo_logprobs=self.prompt_logprobs is not None,
            num_prompt_logprobs=self.prompt_logprobs or 0,
            guide=self.guide(),
        )

    def guide(self) -> Guide | None:
        """What the text must look like. Raises InvalidRequest."""
        return only_one(
            "`response_format`, `structured_outputs` and `guided_*`",
            [
                format_guide("response_format", self.response_format),
                structured_guide("structured_outputs", self.structured_outputs),
                *older_vllm_guides(
                    {
                        "json": self.guided_json,
                        "regex": self.guided_regex,
                        "choice": self.guided_choice,
                        "grammar": self.guided_grammar,
                    },
                    self.guided_whitespace_pattern,
                ),
            ],
        )

    def _bias_by_token(self) -> dict[int, float] | None:
        if not self.logit_bias:
            return None
        if isinstance(self.logit_bias, list):
            raise InvalidRequest("`logit_bias` must be an object: token id → bias")
        if len(self.logit_bias) > MAX_LOGIT_BIAS:
            raise InvalidRequest(f"`logit_bias` must have at most {MAX_LOGIT_BIAS} tokens")
        bias: dict[int, float] = {}
        for token_id, value in self.logit_bias.items():
            if not (token_id.isascii() and token_id.isdigit() and len(token_id) <= 10):
                raise InvalidRequest(f"`logit_bias` must name tokens by their ids. Given: {token_id[:40]!r}")
            if not -100 <= value <= 100:
                raise InvalidRequest("`logit_bias` values must be from -100 to 100")
            bias[int(token_id)] = value
        return bias


class ChatMessage(_Body):
    """One message of a conversation."""

    role: str = Field(description="system, developer, user, assistant or tool", examples=["user"])
    content: StrictStr | list[dict[str, Any]] | None = Field(None, description="a text, or parts of type text",
                                                             examples=["Where is the treasure?"])  # fmt: skip
    name: str | None = Field(None, description="who speaks")
    tool_calls: list[dict[str, Any]] | None = Field(None, description="calls that the assistant made earlier")
    tool_call_id: str | None = Field(None, description="the call that a tool's message answers")
    reasoning_content: str | None = Field(None, description="what the assistant thought before this message, for chat "
                                          "templates that show it")  # fmt: skip
    reasoning: str | None = Field(None, description="the newer name of reasoning_content")

    def for_template(self) -> Message:
        """The message as templates expect it: content as one text."""
        given: Message = {"role": self.role, "content": self._text()}
        for name in ("name", "tool_calls", "tool_call_id"):
            value = getattr(self, name)
            if value is not None:
                given[name] = value
        thought = self.reasoning_content if self.reasoning is None else self.reasoning
        if thought is not None:
            given["reasoning"] = given["reasoning_content"] = thought  # templates know either name
        return given

    def _text(self) -> str:
        if self.content is None:
            if not self.tool_calls:
                raise InvalidRequest("a message without `tool_calls` must have `content`")
            return ""
        if isinstance(self.content, str):
            return self.content
        texts: list[str] = []
        for part in self.content:
            text = part.get("text")
            if part.get("type") != "text" or not isinstance(text, str):
                kind = str(part.get("type"))[:40]
                raise InvalidRequest(f"message parts must be of type text; this model reads no {kind!r}")
            texts.append(text)
        return "".join(texts)


class ChatBody(_GenerationBody):
    """The body of /v1/chat/completions."""

    messages: list[ChatMessage] = Field(description="the conversation so far")
    max_completion_tokens: UInt32 | None = Field(None, description="the newer name of max_tokens")
    logprobs: bool | None = Field(None, description="report the tokens' log-probabilities")
    top_logprobs: UInt32 | None = Field(None, description="0 to 20; and those of so many others at each place")
    tools: list[Any] | None = Field(None, description="functions that the model may ask the client to call")
    tool_choice: Any = Field(None, description="auto, none, required, or a function that must be called")
    parallel_tool_calls: bool | None = Field(None, description="false for one call an answer")
    tool_prompt: str | None = Field(None, description="words about the tools, behind the last message of the user")
    add_generation_prompt: bool | None = Field(None, description="let the prompt end where the assistant speaks")
    continue_final_message: bool | None = Field(None, description="let the model go on with the last message; the "
                                                "default for a last message of the assistant")  # fmt: skip
    add_special_tokens: bool | None = Field(None, description="add the tokenizer's own start token to the prompt")
    chat_template: str | None = Field(None, description="not accepted: the model's own template is used")
    chat_template_kwargs: dict[str, Any] | None = Field(None, description="variables for the chat template")
    reasoning_effort: str | None = Field(None, description="for chat templates that know it; none also asks templates "
                                         "for no thinking")  # fmt: skip
    documents: list[dict[str, Any]] | None = Field(None, description="documents for the chat template")
    echo: bool | None = Field(None, description="refused when true; see /v1/completions")

    def check(self, max_choices: int) -> None:
        """Refuse what is out of bounds in this dialect alone, and what is not served."""
        super().check(max_choices)
        if not self.messages:
            raise InvalidRequest("`messages` must not be empty")
        if self.echo:
            raise InvalidRequest("`echo` is not supported: the prompt is what the chat template makes of `messages`; "
                                 "/v1/completions echoes")  # fmt: skip
        if self.chat_template is not None:
            raise InvalidRequest("`chat_template` is not accepted from a request; the model's own is used")
        if self.top_logprobs is not None and self.top_logprobs > MAX_TOP_LOGPROBS:
            raise InvalidRequest(f"`top_logprobs` must be from 0 to {MAX_TOP_LOGPROBS}. Given: {self.top_logprobs}")
        if self.top_logprobs and not self.logprobs:
            raise InvalidRequest("`top_logprobs` needs `logprobs`")

    def tool_use(self) -> ToolUse | None:
        """What the request wants of its tools; None when none may be called. Raises ToolFailed."""
        use = read_tool_use(self.tools, self.tool_choice, self.parallel_tool_calls)
        guide = None if use is None else self.guide()
        if guide is not None and guide.kind != "json_schema":
            raise ToolFailed("Grammar and tools are mutually exclusive; a JSON schema goes with tools")
        return use

    def conversation(self) -> Conversation:
        """What the chat template renders."""
        messages = [message.for_template() for message in self.messages]
        check_tool_messages(messages)
        use = self.tool_use()
        ends_with_assistant = messages[-1]["role"] == "assistant"
        continues = self.continue_final_message
        if continues is None:
            continues = ends_with_assistant and not self.add_generation_prompt
        if continues and not ends_with_assistant:
            raise InvalidRequest("`continue_final_message` needs a last message of the role assistant")
        if continues and self.add_generation_prompt:
            raise InvalidRequest("`continue_final_message` and `add_generation_prompt` must not both be true")
        return Conversation(
            messages=messages,
            add_generation_prompt=not continues and self.add_generation_prompt is not False,
            continue_final_message=continues,
            variables=self._variables(),
            tools=() if use is None else use.tools,
            tool_prompt=self.tool_prompt,
        )

    def _variables(self) -> dict[str, Any]:
        given: dict[str, Any] = {"documents": self.documents} if self.documents else {}
        effort = self.reasoning_effort
        thinking: dict[str, Any] = {} if effort is None else {"reasoning_effort": effort}
        # As vLLM: most families' templates know thinking as a switch.
        thinking |= {"enable_thinking": False} if effort == "none" else {}
        return thinking | (self.chat_template_kwargs or {}) | given

    def job(self, prompt: str, adapter_id: str | None) -> GenerationJob:
        """The same without the dialect, for the prompt that the template gave."""
        asked = self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens
        return dataclasses.replace(
            self._job(prompt, adapter_id, asked),
            add_special_tokens=bool(self.add_special_tokens),
            num_top_logprobs=(self.top_logprobs or 0) if self.logprobs else 0,
        )


class TokenizeBody(_Body):
    """vLLM's body of /tokenize: a prompt."""

    model: str | None = Field(None, description="any model of this server: all have the same tokenizer")
    prompt: str = Field(description="the text")
    add_special_tokens: bool | None = Field(None, description="false leaves out the tokenizer's own start token")
    return_token_strs: bool | None = Field(None, description="also spell the tokens")


class TokenizeChatBody(ChatBody):
    """vLLM's body of /tokenize: a conversation."""

    return_token_strs: bool | None = Field(None, description="also spell the tokens")


class DetokenizeBody(_Body):
    """The body of /detokenize."""

    model: str | None = Field(None, description="any model of this server: all have the same tokenizer")
    tokens: list[StrictInt] = Field(description="token ids", examples=[[1, 2, 3]])


class CompletionBody(_GenerationBody):
    """The body of /v1/completions."""

    prompt: StrictStr | list[StrictStr] | list[StrictInt] | list[list[StrictInt]] = Field(
        description="a text, token ids, or a list of either", examples=["Where is the treasure?"]
    )
    echo: bool | None = Field(None, description="put the prompt in front of the text")
    logprobs: UInt32 | None = Field(None, description="0 to 20; report log-probabilities, and those of so many others "
                                    "at each place")  # fmt: skip
    best_of: Int32 | None = Field(None, description="not supported above `n`")
    suffix: str | None = Field(None, description="not supported")
    add_special_tokens: bool | None = Field(None, description="false leaves out the tokenizer's own start token")

    def check(self, max_choices: int) -> None:
        """Refuse what is out of bounds in this dialect alone, and what is not served."""
        super().check(max_choices)
        if self.suffix:
            raise InvalidRequest("`suffix` is not supported")
        if self.best_of is not None and self.best_of != self.num_choices:
            raise InvalidRequest("`best_of` other than `n` is not supported")
        if self.logprobs is not None and self.logprobs > MAX_TOP_LOGPROBS:
            raise InvalidRequest(f"`logprobs` must be from 0 to {MAX_TOP_LOGPROBS}. Given: {self.logprobs}")
        if self.stream and self.echo and self.logprobs is not None:
            raise InvalidRequest("`echo` with `logprobs` is not supported in a stream")
        if self.max_tokens == 0 and not self.echo:
            raise InvalidRequest("`max_tokens` must be >= 1, or 0 with `echo`")

    @property
    def prompts(self) -> list[str | tuple[int, ...]]:
        """Each prompt, as a text or as token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [tuple(one for one in self.prompt if isinstance(one, int))]
        return [one if isinstance(one, str) else tuple(one) for one in self.prompt if not isinstance(one, int)]

    def job(self, prompt: str | tuple[int, ...], adapter_id: str | None) -> GenerationJob:
        """The same without the dialect, for one of the prompts."""
        asked = DEFAULT_COMPLETION_TOKENS if self.max_tokens is None else self.max_tokens
        is_text = isinstance(prompt, str)
        return dataclasses.replace(
            # A prompt that is only echoed has a token generated too, and left out of the answer.
            self._job(prompt if isinstance(prompt, str) else "", adapter_id, max(asked, 1)),
            prompt_token_ids=None if isinstance(prompt, str) else prompt,
            add_special_tokens=is_text and self.add_special_tokens is not False,
            echo_logprobs=self.prompt_logprobs is not None or (bool(self.echo) and self.logprobs is not None),
            num_top_logprobs=self.logprobs or 0,
            num_prompt_logprobs=max(self.prompt_logprobs or 0, (self.logprobs or 0) if self.echo else 0),
        )
