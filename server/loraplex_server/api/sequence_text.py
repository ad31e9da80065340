"""One sequence's tokens turned into text: incremental decoding, stop strings, the words of the last event."""

from loraplex_server.api.job import Completion, PromptToken, StopReason, TextDelta, Token
from loraplex_server.errors import GenerationFailed, IncompleteGeneration
from loraplex_server.messages import SamplingParams, TokenOutput, TopLogprob
from loraplex_server.text.detokenizer import StopChecker
from loraplex_server.text.tokenizer import Tokenizer

# What stands for minus infinity, the log-probability of a token that a filter removed: JSON has no infinity, and
# clients want a number.
LOWEST_LOGPROB = -9999.0


class SequenceText:
    """The text of one sequence so far; `feed` it the engine's outputs until a delta has a completion."""

    def __init__(
        self, tokenizer: Tokenizer, prompt_token_ids: list[int], stop: tuple[str, ...], sampling: SamplingParams
    ):
        self._tokenizer = tokenizer
        self._prompt_token_ids = prompt_token_ids
        self._detokenizer = tokenizer.new_detokenizer(prompt_token_ids)
        self._stop = stop
        self._stop_checker = StopChecker(list(stop)) if stop else None
        self._sampling = sampling
        self._pieces: list[str] = []
        self._num_tokens = 0
        self._num_cached_tokens = 0
        self._prompt_logprobs: list[float | None] | None = None
        self._prompt_top_logprobs: list[list[TopLogprob]] = []

    def feed(self, output: TokenOutput) -> TextDelta:
        """The tokens of one output; those behind a stop string are left out."""
        if output.finish_reason == "error":
            raise GenerationFailed(output.error or "the engine gave no reason")
        self._num_cached_tokens = max(self._num_cached_tokens, output.num_cached_tokens)
        if output.prompt_logprobs is not None:
            self._prompt_logprobs = output.prompt_logprobs
            self._prompt_top_logprobs = output.prompt_top_logprobs
        tokens: list[Token] = []
        is_first = self._num_tokens == 0
        reason: StopReason | None = None
        last = len(output.token_ids) - 1
        for i, token_id in enumerate(output.token_ids):
            text = self._detokenizer.add(token_id)
            if i == last and output.finish_reason is not None:
                text += self._detokenizer.flush()
            is_special = self._tokenizer.is_special(token_id)
            # A special token is no part of the text, but its spelling is shown and may be asked for as a stop string.
            spelling = self._tokenizer.token_text(token_id) if is_special else text
            if self._stop_checker is not None and self._num_tokens >= self._sampling.min_new_tokens:
                kept = self._stop_checker.feed(spelling)
                if kept is not None:
                    reason = "stop_sequence"
                    if not is_special:
                        text = spelling = text[:kept]
            self._pieces.append(text)
            self._num_tokens += 1
            tokens.append(Token(token_id, spelling, output.logprobs[i], is_special))
            if reason is not None:
                break
        if output.finish_reason is not None and len(tokens) == len(output.token_ids):
            # The engine's own reason comes first, as in TGI: length, then end token, then stop string.
            if output.finish_reason == "cancelled":
                raise IncompleteGeneration("Incomplete generation")
            reason = output.finish_reason
        if reason is not None and not tokens:
            # The last event of a stream is the event of a token: an end without one is not an answer.
            raise IncompleteGeneration("Incomplete generation")
        return TextDelta(
            tokens=tokens,
            top_tokens=[self._top_tokens(top) for top in output.top_logprobs[: len(tokens)]],
            prompt_token_ids=self._prompt_token_ids if is_first else None,
            completion=None if reason is None else self._complete(reason, tokens[-1].id),
        )

    def _top_tokens(self, top: list[TopLogprob]) -> list[Token]:
        tokenizer = self._tokenizer
        return [
            Token(
                entry.token_id,
                tokenizer.token_text(entry.token_id),
                max(entry.logprob, LOWEST_LOGPROB),
                tokenizer.is_special(entry.token_id),
            )
            for entry in top
        ]

    def _complete(self, reason: StopReason, last_token_id: int) -> Completion:
        return Completion(
            text="".join(self._pieces),
            finish_reason=reason,
            seed=self._sampling.seed if self._sampling.do_sample else None,
            num_prompt_tokens=len(self._prompt_token_ids),
            num_generated_tokens=self._num_tokens,
            num_cached_tokens=self._num_cached_tokens,
            prompt_token_ids=self._prompt_token_ids,
            stop_reason=self._stop_reason(reason, last_token_id),
            prompt_tokens=self._prompt_tokens(),
            prompt_top_tokens=[self._top_tokens(top) for top in self._prompt_top_logprobs],
        )

    def _stop_reason(self, reason: StopReason, last_token_id: int) -> str | int | None:
        if reason == "stop_sequence":
            text = "".join(self._pieces)
            spelling = self._tokenizer.token_text(last_token_id)
            return next((stop for stop in self._stop if text.endswith(stop) or spelling.endswith(stop)), None)
        is_stop_token = reason == "eos_token" and last_token_id in self._sampling.stop_token_ids
        return last_token_id if is_stop_token else None

    def _prompt_tokens(self) -> list[PromptToken]:
        if self._prompt_logprobs is None:
            return []
        return [
            PromptToken(token_id, self._tokenizer.token_text(token_id), logprob)
            for token_id, logprob in zip(self._prompt_token_ids, self._prompt_logprobs, strict=True)
        ]
