"""Answer bodies and stream chunks of OpenAI's routes."""

from collections.abc import Sequence
from typing import Literal, Protocol

import msgspec
from msgspec import UNSET, UnsetType

from loraplex_server.api.job import FinishedJob, PromptToken, TextDelta, Token

Reason = Literal["stop", "length"]
ChatReason = Literal["stop", "length", "tool_calls"]


class Spelling(Protocol):
    """What a token's text is taken from."""

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of one token by itself."""


class IdSpelling:
    """Tokens spelt by their ids, as vLLM's `return_tokens_as_token_ids` asks."""

    def token_bytes(self, token_id: int) -> bytes:
        """The id behind a word."""
        return f"token_id:{token_id}".encode()


class PromptDetails(msgspec.Struct, frozen=True):
    """More about the prompt's tokens."""

    cached_tokens: int


class Usage(msgspec.Struct, frozen=True):
    """The tokens counted; a prompt with several answers counts once."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails = PromptDetails(0)


def usage(num_prompt_tokens: int, num_generated_tokens: int, num_cached_tokens: int = 0) -> Usage:
    """The counts with their sum."""
    return Usage(
        num_prompt_tokens,
        num_generated_tokens,
        num_prompt_tokens + num_generated_tokens,
        PromptDetails(num_cached_tokens),
    )


class RunningUsage:
    """The counts of a stream so far; a prompt's answers are neighbours, `num_choices` of them."""

    def __init__(self, num_choices: int):
        self._num_choices = num_choices
        self._num_prompt_tokens: dict[int, int] = {}
        self._num_cached_tokens: dict[int, int] = {}
        self._num_generated_tokens = 0

    def add(self, index: int, delta: TextDelta) -> None:
        """Count a delta of one choice."""
        prompt = index // self._num_choices
        if delta.prompt_token_ids is not None:
            self._num_prompt_tokens[prompt] = len(delta.prompt_token_ids)
        if delta.completion is not None:
            self._num_cached_tokens.setdefault(prompt, delta.completion.num_cached_tokens)
        self._num_generated_tokens += len(delta.tokens)

    def leave_out(self, num_tokens: int) -> None:
        """Tokens that were generated and are not shown."""
        self._num_generated_tokens -= num_tokens

    @property
    def now(self) -> Usage:
        """The counts."""
        return usage(
            sum(self._num_prompt_tokens.values()), self._num_generated_tokens, sum(self._num_cached_tokens.values())
        )


class PromptLogprob(msgspec.Struct, frozen=True):
    """A token of a prompt's place, as vLLM tells it; no rank for one that is not among those asked for."""

    logprob: float
    rank: int | None
    decoded_token: str


PromptLogprobs = list[dict[int, PromptLogprob] | None]


def prompt_logprobs(tokens: Sequence[PromptToken], top_tokens: Sequence[Sequence[Token]]) -> PromptLogprobs:
    """The prompt's tokens and the likeliest ones in their places; nothing for the first."""
    found: PromptLogprobs = []
    for place, token in enumerate(tokens):
        if token.logprob is None:
            found.append(None)
            continue
        tops = top_tokens[place] if top_tokens else ()
        ranked = {top.id: PromptLogprob(top.logprob, rank, top.text) for rank, top in enumerate(tops, start=1)}
        found.append({token.id: PromptLogprob(token.logprob, None, token.text)} | ranked)
    return found


def shown_if_set(value: str | int | None) -> str | int | UnsetType:
    """A field of an answer that is left out where it says nothing."""
    return UNSET if value is None else value


class TopLogprob(msgspec.Struct, frozen=True):
    """A likely token and its log-probability."""

    token: str
    logprob: float
    bytes: list[int]


class ChatLogprob(msgspec.Struct, frozen=True):
    """A generated token, its log-probability and the likeliest ones in its place."""

    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct, frozen=True):
    """The log-probabilities of a choice or chunk."""

    content: list[ChatLogprob]
    refusal: None = None


def chat_logprobs(tokens: Sequence[Token], top_tokens: Sequence[Sequence[Token]], spelling: Spelling) -> ChatLogprobs:
    """The log-probabilities of tokens as chat shows them."""
    content: list[ChatLogprob] = []
    for i, token in enumerate(tokens):
        raw = spelling.token_bytes(token.id)
        top = [_top_logprob(one, spelling) for one in (top_tokens[i] if top_tokens else ())]
        content.append(ChatLogprob(raw.decode(errors="replace"), token.logprob, [*raw], top))
    return ChatLogprobs(content)


def _top_logprob(token: Token, spelling: Spelling) -> TopLogprob:
    raw = spelling.token_bytes(token.id)
    return TopLogprob(raw.decode(errors="replace"), token.logprob, [*raw])


class CalledFunction(msgspec.Struct, frozen=True, kw_only=True):
    """The function of a call; its arguments are JSON text, or a piece of it."""

    name: str | UnsetType = UNSET
    arguments: str


class ToolCall(msgspec.Struct, frozen=True):
    """A call of a tool."""

    id: str
    function: CalledFunction
    type: str = "function"


class ToolCallDelta(msgspec.Struct, frozen=True):
    """What a chunk adds to a call; the id, the type and the name come with its first chunk only."""

    index: int
    function: CalledFunction
    id: str | UnsetType = UNSET
    type: str | UnsetType = UNSET


class AssistantMessage(msgspec.Struct, frozen=True):
    """What the model said: a text, calls of tools, or both; and what it thought, under vLLM's newer and older name."""

    content: str | None
    role: str = "assistant"
    tool_calls: list[ToolCall] | UnsetType = UNSET
    reasoning: str | UnsetType = UNSET
    reasoning_content: str | UnsetType = UNSET


class ChatChoice(msgspec.Struct, frozen=True):
    """One answer."""

    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: ChatReason
    stop_reason: str | int | UnsetType = UNSET  # vLLM's: the stop text or token that ended the answer
    token_ids: list[int] | UnsetType = UNSET


class ChatAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """The answer of /v1/chat/completions."""

    id: str
    object: str = "chat.completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_token_ids: list[int] | UnsetType = UNSET
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET


class ChatDelta(msgspec.Struct, frozen=True):
    """What a chunk adds to the message; the role is in the first one only."""

    role: str | UnsetType = UNSET
    content: str | UnsetType = UNSET
    tool_calls: list[ToolCallDelta] | UnsetType = UNSET
    reasoning: str | UnsetType = UNSET
    reasoning_content: str | UnsetType = UNSET


class ChatChunkChoice(msgspec.Struct, frozen=True):
    """What a chunk adds to one answer."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: ChatReason | None = None
    stop_reason: str | int | UnsetType = UNSET
    token_ids: list[int] | UnsetType = UNSET


class ChatChunk(msgspec.Struct, frozen=True, kw_only=True):
    """One event of a chat's stream; `usage` is there when it was asked for, and filled in the last chunk."""

    id: str
    object: str = "chat.completion.chunk"
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChunkChoice]
    usage: Usage | UnsetType | None = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET


class CompletionLogprobs(msgspec.Struct, frozen=True):
    """The log-probabilities of a text's tokens; `text_offset` says where in the text each one begins."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(msgspec.Struct, frozen=True):
    """One text, whole or a chunk of it; a chunk before the last has no finish reason."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: Reason | None = None
    stop_reason: str | int | UnsetType = UNSET
    token_ids: list[int] | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET


class CompletionAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """The answer of /v1/completions, and one event of its stream."""

    id: str
    object: str = "text_completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: Usage | UnsetType | None = UNSET


class CompletionLogprobsWriter:
    """Collects a choice's log-probabilities, chunk after chunk."""

    def __init__(self, spelling: Spelling):
        self._spelling = spelling
        self._offset = 0

    def prompt(self, tokens: Sequence[PromptToken], top_tokens: Sequence[Sequence[Token]]) -> CompletionLogprobs:
        """Those of an echoed prompt; the first token has none."""
        tops: list[dict[str, float] | None] = [
            None if token.logprob is None else self._top(token.id, token.logprob, top_tokens[i] if top_tokens else ())
            for i, token in enumerate(tokens)
        ]
        return self._logprobs([token.id for token in tokens], [token.logprob for token in tokens], tops)

    def output(self, tokens: Sequence[Token], top_tokens: Sequence[Sequence[Token]]) -> CompletionLogprobs:
        """Those of generated tokens."""
        tops: list[dict[str, float] | None] = [
            self._top(token.id, token.logprob, top_tokens[i] if top_tokens else ()) for i, token in enumerate(tokens)
        ]
        return self._logprobs([token.id for token in tokens], [token.logprob for token in tokens], tops)

    def _logprobs(
        self, token_ids: list[int], logprobs: Sequence[float | None], tops: list[dict[str, float] | None]
    ) -> CompletionLogprobs:
        texts = [self._text(token_id) for token_id in token_ids]
        offsets: list[int] = []
        for text in texts:
            offsets.append(self._offset)
            self._offset += len(text)
        return CompletionLogprobs(texts, [*logprobs], tops, offsets)

    def _top(self, token_id: int, logprob: float, top: Sequence[Token]) -> dict[str, float]:
        return {self._text(one.id): one.logprob for one in top} | {self._text(token_id): logprob}

    def _text(self, token_id: int) -> str:
        raw = self._spelling.token_bytes(token_id)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            # A part of a character, as OpenAI writes it: two of them must not look alike.
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def joined(first: CompletionLogprobs, second: CompletionLogprobs) -> CompletionLogprobs:
    """Two runs of tokens as one."""
    return CompletionLogprobs(
        first.tokens + second.tokens,
        first.token_logprobs + second.token_logprobs,
        first.top_logprobs + second.top_logprobs,
        first.text_offset + second.text_offset,
    )


def summed_usage(finished: Sequence[FinishedJob], num_choices: int, num_unseen_tokens: int = 0) -> Usage:
    """The counts of an answer whose jobs come `num_choices` a prompt; unseen tokens are not counted."""
    ends = [one.best.completion for one in finished]
    return usage(
        sum(end.num_prompt_tokens for end in ends[::num_choices]),
        sum(end.num_generated_tokens - num_unseen_tokens for end in ends),
        sum(end.num_cached_tokens for end in ends[::num_choices]),
    )
