"""Fields that vLLM adds to OpenAI's bodies: what they change in the draw, and what they add to answers."""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StrictInt, StrictStr

from loraplex_server.errors import InvalidRequest

MAX_BAD_WORDS = 256
MAX_BAD_WORD_LENGTH = 256
MAX_ALLOWED_TOKENS = 65_536

_Count = Annotated[int, Field(ge=0, le=2**32 - 1)]
_Int = Annotated[int, Field(ge=-(2**31), le=2**31 - 1)]

# Field → what a client can do instead. They would change the answer, so leaving them out is not an answer to them.
_NOT_SERVED = {
    "use_beam_search": "beams are not searched",
    "logprob_token_ids": "use `top_logprobs` or `logprobs`",
    "thinking_token_budget": "use `max_tokens`",
    "repetition_detection": "use `repetition_penalty` or `frequency_penalty`",
    "prompt_embeds": "send text or token ids",
    "cache_salt": "the prefix cache is shared; start the server with --no-prefix-caching to have none",
    "functions": "use `tools`",
    "web_search_options": "this server searches nothing; use `tools`",
    "kv_transfer_params": "the KV cache stays where it is",
}


class VllmFields(BaseModel):
    """What chat and completions take besides OpenAI's fields and TGI's."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)

    lora_path: str | None = Field(None, description="SGLang's name of adapter_id")
    min_tokens: _Count | None = Field(None, description="no end token, stop token or stop text before so many tokens")
    allowed_token_ids: list[StrictInt] | None = Field(None, description="only these tokens are generated")
    bad_words: list[StrictStr] | None = Field(None, description="words that are not generated")
    prompt_logprobs: _Int | None = Field(None, description="0 to 20; log-probabilities of the prompt's tokens and of "
                                         "so many others at each place; not in streams")  # fmt: skip
    return_token_ids: bool | None = Field(None, description="add the token ids of prompt and answer")
    return_tokens_as_token_ids: bool | None = Field(None, description="log-probabilities name tokens as token_id:ID")
    include_reasoning: bool | None = Field(None, description="false leaves out what the model thought, where it "
                                           "is told apart")  # fmt: skip
    truncation_side: str | None = Field(None, description="left, the only one served")
    use_beam_search: bool | None = Field(None, description="refused when true")
    logprob_token_ids: Any = Field(None, description="not supported; see top_logprobs")
    thinking_token_budget: Any = Field(None, description="not supported; see max_tokens")
    repetition_detection: Any = Field(None, description="not supported; see repetition_penalty")
    prompt_embeds: Any = Field(None, description="not supported")
    cache_salt: Any = Field(None, description="not supported")
    functions: Any = Field(None, description="OpenAI's older tools, not supported; see tools")
    web_search_options: Any = Field(None, description="not supported")
    kv_transfer_params: Any = Field(None, description="not supported")

    def check_vllm_fields(self, *, is_stream: bool, max_logprobs: int) -> None:
        """Raises InvalidRequest for what is out of bounds or not served."""
        for name, instead in _NOT_SERVED.items():
            if getattr(self, name):
                raise InvalidRequest(f"`{name}` is not supported: {instead}")
        if self.truncation_side not in (None, "left"):
            raise InvalidRequest("`truncation_side` must be left: the last tokens of a prompt are kept")
        if self.allowed_token_ids is not None and not 1 <= len(self.allowed_token_ids) <= MAX_ALLOWED_TOKENS:
            raise InvalidRequest(
                f"`allowed_token_ids` must have 1 to {MAX_ALLOWED_TOKENS} tokens. Given: {len(self.allowed_token_ids)}"
            )
        self._check_bad_words(self.bad_words or [])
        if self.prompt_logprobs is not None:
            if not 0 <= self.prompt_logprobs <= max_logprobs:
                raise InvalidRequest(
                    f"`prompt_logprobs` must be from 0 to {max_logprobs}. Given: {self.prompt_logprobs}"
                )
            if is_stream:
                raise InvalidRequest("`prompt_logprobs` is not supported in a stream")

    @staticmethod
    def _check_bad_words(words: list[str]) -> None:
        if len(words) > MAX_BAD_WORDS:
            raise InvalidRequest(f"`bad_words` must have at most {MAX_BAD_WORDS} words. Given: {len(words)}")
        for word in words:
            if not word.strip() or len(word) > MAX_BAD_WORD_LENGTH:
                raise InvalidRequest(f"a word of `bad_words` must have 1 to {MAX_BAD_WORD_LENGTH} characters")
