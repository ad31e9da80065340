"""Words that must not be generated, as the runs of tokens that spell them."""

from collections.abc import Iterable
from typing import Protocol


class Encoder(Protocol):
    """What turns text into tokens."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """The token ids of a text."""


def bad_word_tokens(words: Iterable[str], encoder: Encoder) -> tuple[tuple[int, ...], ...]:
    """Each word as it is spelt at a text's beginning and behind a space.

    As in vLLM, a spelling by other tokens is not found: `bad_words` is a strong hint, not a filter of the text.
    """
    runs: dict[tuple[int, ...], None] = {}
    for word in words:
        for text in (word.lstrip(), " " + word.lstrip()):
            token_ids = tuple(encoder.encode(text, add_special_tokens=False))
            if token_ids:
                runs[token_ids] = None
    return tuple(runs)
