"""Texts drawn from a grammar without a model: at each place one of the bytes that it allows, all alike likely."""

import random
from pathlib import Path

import numpy as np
from tiny_tokenizer import byte_tokenizer

from loraplex_server.text.guide_compiler import Vocabulary, fill_mask, grammar_of
from loraplex_server.text.guides import Guide

END = 2


class GrammarWalker:
    """Random texts of grammars over the tokenizer of single bytes; special tokens may be added to it."""

    def __init__(self, folder: Path, special_tokens: tuple[str, ...] = ()):
        self._tokenizer = byte_tokenizer()
        self._tokenizer.add_special_tokens(list(special_tokens))
        path = folder / "tokenizer.json"
        self._tokenizer.save(str(path))
        self._vocabulary = Vocabulary(str(path), self._tokenizer.get_vocab_size(), [END])
        self._special = {self._tokenizer.token_to_id(token): token for token in special_tokens}

    def special_id(self, text: str) -> int | None:
        """The id of a special token."""
        return next((token_id for token_id, token in self._special.items() if token == text), None)

    def text(self, guide: Guide, seed: int, max_tokens: int = 2_000) -> str:
        """One text of the guide, to its end."""
        rng = random.Random(seed)
        matcher = self._vocabulary.matcher(grammar_of(guide))
        mask = np.zeros((1, self._vocabulary.num_words), dtype=np.int32)
        raw = b""
        for _ in range(max_tokens):
            problem = fill_mask(matcher, mask, 0)
            assert problem is None, problem
            allowed = np.flatnonzero(np.unpackbits(mask.view(np.uint8)[0], bitorder="little")).tolist()
            # The end where there is one: what goes on without need would go on for long.
            token_id = END if END in allowed and rng.random() < 0.5 else rng.choice(allowed)
            if token_id == END:
                return raw.decode()
            assert matcher.consume_token(token_id), (raw, token_id, self._bytes(token_id), matcher.get_error())
            raw += self._bytes(token_id)
        raise AssertionError(f"no end after {max_tokens} tokens: {raw[:200]!r}")

    def _bytes(self, token_id: int) -> bytes:
        if token_id in self._special:
            return self._special[token_id].encode()
        return self._vocabulary.token_bytes(token_id)
