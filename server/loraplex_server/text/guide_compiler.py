"""Guides become llguidance's grammars, and these become matchers over one vocabulary; the only user of llguidance."""

import json
from collections.abc import Sequence

import llguidance
import numpy as np
from llguidance.gbnf_to_lark import any_to_lark
from llguidance.numpy import fill_next_token_bitmask
from numpy.typing import NDArray

from loraplex_server.text.guides import Guide
from loraplex_server.text.json_schema import SchemaError, schema_text

# What a compiler says of a grammar may quote all of it.
MAX_REASON_CHARACTERS = 300


class GuideError(Exception):
    """A guide that cannot be compiled, or that no text satisfies; the message says why."""


# By default llguidance lets a text that must come be written in one way only, its own tokenisation. Where the text
# looks like a special token (a property named "<|im_end|>") that is the token, which then ends or breaks the answer.
_HEADER = '%llguidance {"no_forcing": true}\n'


def grammar_of(guide: Guide) -> str:
    """A guide in llguidance's own notation, not compiled yet. Raises GuideError."""
    match guide.kind:
        case "json_schema":
            return f"{_HEADER}start: %json {_schema_with_options(guide)}"
        case "regex":
            escaped = json.loads(llguidance.LLMatcher.grammar_from_regex(guide.text))["grammars"][0]["lark_grammar"]
            return f"{_HEADER}{escaped}"
        case "grammar":
            return f"{_HEADER}{_as_lark(guide.text)}"
        case "lark":
            return f"{_HEADER}{guide.text}"


def _schema_with_options(guide: Guide) -> str:
    try:
        return schema_text(guide.text, guide.whitespace)
    except SchemaError as error:
        raise GuideError(f"the schema {error}") from None


def _as_lark(text: str) -> str:
    try:
        return any_to_lark(text)
    except Exception as error:  # the converter raises several kinds, some of them plain Exception
        raise GuideError(f"it is neither Lark nor GBNF: {_shortened(str(error))}") from None


class Vocabulary:
    """The tokens of one model as llguidance sees them, and what it takes to fill masks over them."""

    def __init__(self, tokenizer_path: str, vocab_size: int, end_token_ids: Sequence[int]):
        """Raises GuideError for a tokenizer that llguidance cannot use, or a model without an end token."""
        if not end_token_ids:
            raise GuideError("this model names no end token, so no answer to a grammar could end")
        self._end_token_ids = list(end_token_ids)
        try:
            # A model may have more rows than its tokenizer has tokens; more tokens than rows is possible too.
            num_tokens = llguidance.LLTokenizer(tokenizer_path, eos_token=self._end_token_ids).vocab_size
            self.num_tokens = max(vocab_size, num_tokens)
            self._tokenizer = llguidance.LLTokenizer(
                tokenizer_path, n_vocab=self.num_tokens, eos_token=self._end_token_ids
            )
        except ValueError as error:
            raise GuideError(f"this model's tokenizer cannot be used with grammars: {error}") from None
        self.num_words = -(-self.num_tokens // 32)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token stands for in a text."""
        return self._tokenizer.decode_bytes([token_id])

    def matcher(self, grammar: str) -> llguidance.LLMatcher:
        """A matcher at the beginning of a text. Raises GuideError for a grammar that no text satisfies."""
        limits = llguidance.LLParserLimits(verbose_errors=False)
        matcher = llguidance.LLMatcher(self._tokenizer, grammar, log_level=0, limits=limits)
        if matcher.is_error():
            raise GuideError(_shortened(matcher.get_error()))
        # The first mask builds what a compilation leaves out, and shows whether there is any first token.
        mask = np.zeros((1, self.num_words), dtype=np.int32)
        problem = fill_mask(matcher, mask, 0)
        if problem is not None:
            raise GuideError(problem)
        return matcher


def fill_mask(matcher: llguidance.LLMatcher, masks: NDArray[np.int32], line: int) -> str | None:
    """Write which tokens may come next to a line of `masks`, in place; returns why none can, or None.

    masks: [lines, ceil(vocabulary / 32)] int32, bit i of a line for token i, the lowest bit of a word first.
    """
    fill_next_token_bitmask(matcher, masks, line)
    if not matcher.is_error():
        return None
    # After an error llguidance allows the end token, which would pass for a whole answer.
    masks[line] = 0
    return f"no text can go on from here ({matcher.stop_reason()})"


def _shortened(reason: str) -> str:
    reason = " ".join(reason.split())
    return reason if len(reason) <= MAX_REASON_CHARACTERS else f"{reason[:MAX_REASON_CHARACTERS]}…"
