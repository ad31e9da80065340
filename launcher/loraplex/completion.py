"""One sequence as it is generated offline: tokens, text, log-probabilities, and why it ended, as vLLM tells it."""

from loraplex.lora_request import LoRARequest
from loraplex.outputs import CompletionOutput, Logprob, LogprobsOfToken
from loraplex.sampling_params import SamplingParams
from loraplex_server.messages import TokenOutput, TopLogprob
from loraplex_server.text.detokenizer import StopChecker
from loraplex_server.text.tokenizer import Tokenizer


class OpenCompletion:
    """Takes the engine's outputs for one sequence until it has ended."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_token_ids: list[int],
        params: SamplingParams,
        end_token_ids: frozenset[int],
    ):
        self._tokenizer = tokenizer
        self._prompt_token_ids = prompt_token_ids
        self._detokenizer = tokenizer.new_detokenizer(prompt_token_ids) if params.detokenize else None
        self._params = params
        self._end_token_ids = frozenset() if params.ignore_eos else end_token_ids
        self._stop_token_ids = frozenset(params.stop_token_ids or ())
        self._stop_checker = StopChecker(params.stop_strings) if params.stop_strings else None
        self._text = ""
        self._token_ids: list[int] = []
        self._logprobs: list[LogprobsOfToken] = []
        self._finish_reason: str | None = None
        self._stop_reason: str | int | None = None
        self._error: str | None = None
        self.cumulative_logprob = 0.0
        self.prompt_logprobs: list[LogprobsOfToken | None] | None = None
        self.num_cached_tokens = 0

    def feed(self, output: TokenOutput) -> bool:
        """Take one output; returns whether the sequence has ended, by the engine's word or by a stop string."""
        self.num_cached_tokens = max(self.num_cached_tokens, output.num_cached_tokens)
        if output.prompt_logprobs is not None:
            self.prompt_logprobs = self._of_prompt(output.prompt_logprobs, output.prompt_top_logprobs)
        for i, token_id in enumerate(output.token_ids):
            self._count(token_id, output.logprobs[i], output.top_logprobs[i] if output.top_logprobs else [])
            if self._add_text(self._text_of(token_id)):
                return True
        if output.finish_reason is None:
            return False
        if output.finish_reason == "error":
            self._finish_reason, self._error = "error", output.error
            return True
        if self._detokenizer is not None and self._add_text(self._detokenizer.flush()):
            return True
        last = self._token_ids[-1]
        # vLLM says «stop» for an end token also where it was the last one allowed.
        self._finish_reason = "stop" if self._is_end(last) else "length"
        self._stop_reason = last if last in self._stop_token_ids else None
        return True

    def result(self, index: int, lora_request: LoRARequest | None) -> CompletionOutput:
        """The ended sequence."""
        assert self._finish_reason is not None, "the sequence has not ended"
        return CompletionOutput(
            index=index,
            text=self._text,
            token_ids=self._token_ids,
            cumulative_logprob=self.cumulative_logprob,
            logprobs=None if self._params.logprobs is None else self._logprobs,
            finish_reason=self._finish_reason,
            stop_reason=self._stop_reason,
            lora_request=lora_request,
            error=self._error,
        )

    def _is_end(self, token_id: int) -> bool:
        return token_id in self._end_token_ids or token_id in self._stop_token_ids

    def _count(self, token_id: int, logprob: float, top_logprobs: list[TopLogprob]) -> None:
        self._token_ids.append(token_id)
        self.cumulative_logprob += logprob
        if self._params.logprobs is None:
            return
        self._logprobs.append(self._of_token(token_id, logprob, top_logprobs, 1 if self._params.is_greedy else None))

    def _of_prompt(
        self, logprobs: list[float | None], top_logprobs: list[list[TopLogprob]]
    ) -> list[LogprobsOfToken | None]:
        tops = top_logprobs or [[] for _ in logprobs]
        return [
            None if logprob is None else self._of_token(token_id, logprob, top)
            for token_id, logprob, top in zip(self._prompt_token_ids, logprobs, tops, strict=True)
        ]

    def _of_token(
        self, token_id: int, logprob: float, top_logprobs: list[TopLogprob], rank: int | None = None
    ) -> LogprobsOfToken:
        """A token and the likeliest ones in its place, itself first; its `rank` is told where it is not among them."""
        ranks = {top.token_id: place for place, top in enumerate(top_logprobs, start=1)}
        found = {token_id: (logprob, ranks.get(token_id, rank))}
        found |= {top.token_id: (top.logprob, ranks[top.token_id]) for top in top_logprobs if top.token_id != token_id}
        return {one: Logprob(*values, self._tokenizer.token_text(one)) for one, values in found.items()}

    def _text_of(self, token_id: int) -> str:
        if self._detokenizer is None:
            return ""
        if self._is_end(token_id) and not self._params.include_stop_str_in_output:
            return ""
        if not self._params.skip_special_tokens and self._tokenizer.is_special(token_id):
            return self._detokenizer.flush() + self._tokenizer.token_text(token_id)
        return self._detokenizer.add(token_id)

    def _add_text(self, text: str) -> bool:
        """Add to the text; returns whether a stop string is complete in it, behind which the sequence ends."""
        checker = self._stop_checker if len(self._token_ids) > self._params.min_tokens else None
        kept = None if checker is None else checker.feed(text)
        if kept is None:
            self._text += text
            return False
        self._text += text[:kept]
        stop = next(stop for stop in self._params.stop_strings if self._text.endswith(stop))
        if not self._params.include_stop_str_in_output:
            self._text = self._text.removesuffix(stop)
        self._finish_reason, self._stop_reason = "stop", stop
        return True
