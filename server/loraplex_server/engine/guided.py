"""Structured output in the engine: grammars compiled off the loop, a matcher a row, and the mask of a step's rows."""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import llguidance
import numpy as np
from numpy.typing import NDArray

from loraplex_server.text.guide_compiler import GuideError, Vocabulary, fill_mask

# Compiled grammars that are kept although no sequence has them; most are small, the largest take some MiB.
MAX_IDLE = 64


class _Entry:
    """A grammar, compiled or on its way, and how many sequences have it."""

    __slots__ = ("compilation", "num_users")

    def __init__(self, compilation: Future[llguidance.LLMatcher]):
        self.compilation = compilation
        self.num_users = 0


class GrammarLibrary:
    """Compiled grammars by their text, and a thread that compiles new ones. Used from one thread, the engine's.

    A grammar stays from `acquire` to `release`, and for a while after that. The vocabulary is read with the first
    one, so that an engine without grammars does without it.
    """

    def __init__(self, model_path: str, vocab_size: int, end_token_ids: Sequence[int]):
        self._tokenizer_path = str(Path(model_path) / "tokenizer.json")
        self._vocab_size = vocab_size
        self._end_token_ids = sorted(end_token_ids)
        self._vocabulary: Vocabulary | None = None
        self._entries: dict[str, _Entry] = {}
        self._idle: OrderedDict[str, None] = OrderedDict()  # those without users, the longest idle first
        self._thread: ThreadPoolExecutor | None = None

    def acquire(self, grammar: str) -> None:
        """Keep a grammar for one more sequence; one that is not known begins to be compiled."""
        entry = self._entries.get(grammar)
        if entry is None:
            if self._thread is None:
                self._thread = ThreadPoolExecutor(1, thread_name_prefix="grammars")
            entry = self._entries[grammar] = _Entry(self._thread.submit(self._compile, grammar))
        entry.num_users += 1
        self._idle.pop(grammar, None)

    def release(self, grammar: str) -> None:
        """Keep a grammar for one sequence less."""
        entry = self._entries[grammar]
        entry.num_users -= 1
        if entry.num_users == 0:
            self._idle[grammar] = None
            if len(self._idle) > MAX_IDLE:
                oldest, _ = self._idle.popitem(last=False)
                self._entries.pop(oldest).compilation.cancel()

    def is_ready(self, grammar: str) -> bool:
        """Whether an acquired grammar is compiled, or was found to be bad."""
        return self._entries[grammar].compilation.done()

    def error_of(self, grammar: str) -> str | None:
        """Why an acquired grammar cannot be used, or None; waits where `is_ready` says no."""
        try:
            self._entries[grammar].compilation.result()
        except GuideError as error:
            return str(error)
        return None

    def new_matcher(self, grammar: str) -> llguidance.LLMatcher:
        """A matcher of an acquired grammar, at the beginning of a text. Raises GuideError."""
        return self._entries[grammar].compilation.result().deep_copy()

    @property
    def num_mask_words(self) -> int:
        """The length of a mask in words of 32 tokens, once a grammar was compiled."""
        assert self._vocabulary is not None, "no grammar was compiled"
        return self._vocabulary.num_words

    def close(self) -> None:
        """End the thread."""
        if self._thread is not None:
            self._thread.shutdown(wait=True, cancel_futures=True)

    def _compile(self, grammar: str) -> llguidance.LLMatcher:
        if self._vocabulary is None:  # only this thread sets it
            self._vocabulary = Vocabulary(self._tokenizer_path, self._vocab_size, self._end_token_ids)
        return self._vocabulary.matcher(grammar)


class GuidedRows:
    """What the rows that have a grammar have written so far, and what each may write next."""

    def __init__(self, library: GrammarLibrary):
        self._library = library
        self._matchers: dict[int, llguidance.LLMatcher] = {}
        self._masks = np.zeros((0, 0), dtype=np.int32)

    def start(self, row: int, grammar: str, output_token_ids: Sequence[int]) -> None:
        """Begin a row with what was generated for its sequence before: nothing, or its output up to a preemption."""
        matcher = self._matchers[row] = self._library.new_matcher(grammar)
        matcher.consume_tokens(list(output_token_ids))

    def stop(self, row: int) -> None:
        """Forget a row."""
        del self._matchers[row]

    def masks(self, rows: Sequence[int]) -> tuple[NDArray[np.int32], dict[int, str]]:
        """Which tokens each of the rows may take next, [rows, words] int32, valid until the next call.

        Bit i of a line stands for token i, the lowest bit of a word first. A line without any bit belongs to a row
        that cannot go on; why, is the second part of the answer.
        """
        num_words = self._library.num_mask_words
        if len(self._masks) < len(rows):
            self._masks = np.zeros((max(len(rows), 2 * len(self._masks)), num_words), dtype=np.int32)
        masks = self._masks[: len(rows)]
        problems: dict[int, str] = {}
        for line, row in enumerate(rows):
            problem = fill_mask(self._matchers[row], masks, line)
            if problem is not None:
                problems[row] = f"the grammar: {problem}"
        return masks, problems

    def advance(self, token_ids: Mapping[int, int]) -> None:
        """Take in the tokens that rows have got."""
        for row, token_id in token_ids.items():
            self._matchers[row].consume_token(token_id)
