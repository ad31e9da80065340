"""The model's tokenizer, without transformers: text to token ids in a thread pool, token ids to text."""

import asyncio
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import tokenizers
from tokenizers import processors

from loraplex_server.errors import InvalidRequest
from loraplex_server.text.detokenizer import ByteLevelDetokenizer, ContextDetokenizer, Detokenizer


class TokenizerError(Exception):
    """The tokenizer's files are missing or broken; the message says which and what to do."""


class TokenSpan(msgspec.Struct, frozen=True):
    """A token of a text and the characters it stands for; tokens that were added have start and stop 0."""

    id: int
    text: str
    start: int
    stop: int


def _byte_of_character() -> dict[str, int]:
    # GPT-2's alphabet: printable Latin-1 bytes stand for themselves, the others for the characters from U+0100 on.
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


BYTE_OF_CHARACTER = _byte_of_character()


def _decoder_types(tokenizer: tokenizers.Tokenizer) -> list[str]:
    if tokenizer.decoder is None:
        return []
    state: dict[str, Any] = json.loads(tokenizer.decoder.__getstate__())
    return [part["type"] for part in state.get("decoders", [state])]


def _token_text(value: Any) -> str | None:
    # tokenizer_config.json holds a special token as a string or as an object with its properties.
    return value.get("content") if isinstance(value, dict) else value


def _apply_config(tokenizer: tokenizers.Tokenizer, config: dict[str, Any]) -> None:
    """Let add_bos_token and add_eos_token replace the template of tokenizer.json, as transformers does."""
    if "add_bos_token" not in config and "add_eos_token" not in config:
        return
    added: dict[str, tuple[str, int]] = {}
    for kind in ("bos", "eos"):
        token = _token_text(config.get(f"{kind}_token"))
        token_id = tokenizer.token_to_id(token) if token else None
        if config.get(f"add_{kind}_token") and token and token_id is not None:
            added[kind] = (token, token_id)
    before = [added["bos"][0]] if "bos" in added else []
    after = [added["eos"][0]] if "eos" in added else []
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[*before, "$A", *after], special_tokens=list(added.values())
    )


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TokenizerError(f"the tokenizer's settings '{path}' cannot be read: {error}") from None
    if not isinstance(config, dict):
        raise TokenizerError(f"the tokenizer's settings '{path}' are not a JSON object")
    return config


class Tokenizer:
    """Text to token ids and back, the same as transformers gives for this model. Safe to use from several threads."""

    def __init__(self, tokenizer: tokenizers.Tokenizer, num_threads: int):
        # A saved tokenizer may carry the trainer's truncation and padding; a server wants neither.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="tokenizer")
        self._special_ids = frozenset(
            token_id for token_id, token in tokenizer.get_added_tokens_decoder().items() if token.special
        )
        decoders = _decoder_types(tokenizer)
        self._is_byte_level = "ByteLevel" in decoders
        self._has_byte_tokens = "ByteFallback" in decoders
        self._bytes_of_token: dict[int, bytes] = {}
        self.vocab_size: int = tokenizer.get_vocab_size(with_added_tokens=True)

    @classmethod
    def load(cls, folder: str, num_threads: int, tokenizer_config_path: str | None = None) -> "Tokenizer":
        """Read tokenizer.json of a model folder, and tokenizer_config.json there or at `tokenizer_config_path`.

        Raises TokenizerError.
        """
        path = Path(folder) / "tokenizer.json"
        if not path.is_file():
            raise TokenizerError(
                f"no tokenizer.json in '{folder}': make one with"
                f" transformers.AutoTokenizer.from_pretrained('{folder}').save_pretrained('{folder}')"
            )
        try:
            tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing narrower
            raise TokenizerError(f"'{path}' cannot be read: {error}") from None
        config_path = Path(tokenizer_config_path or Path(folder) / "tokenizer_config.json")
        if tokenizer_config_path is not None or config_path.is_file():
            _apply_config(tokenizer, _read_config(config_path))
        return cls(tokenizer, num_threads)

    def _encode(self, text: str, add_special_tokens: bool, with_offsets: bool) -> tokenizers.Encoding:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise InvalidRequest(f"tokenizer error {error.reason} at character {error.start}") from None
        # Of the library's calls only those for a batch let go of the interpreter lock while they work.
        encode_batch = self._tokenizer.encode_batch if with_offsets else self._tokenizer.encode_batch_fast
        return encode_batch([text], add_special_tokens=add_special_tokens)[0]

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text. Raises InvalidRequest for a text that is not Unicode (a lone surrogate)."""
        return list(self._encode(text, add_special_tokens, with_offsets=False).ids)

    async def encode_async(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """`encode` in the tokenizer's own threads."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, self.encode, text, add_special_tokens)

    def _encode_spans(self, text: str, add_special_tokens: bool) -> list[TokenSpan]:
        encoding = self._encode(text, add_special_tokens, with_offsets=True)
        return [
            TokenSpan(token_id, text[start:stop], start, stop)
            for token_id, (start, stop) in zip(encoding.ids, encoding.offsets, strict=True)
        ]

    async def encode_with_offsets(self, text: str, add_special_tokens: bool = True) -> list[TokenSpan]:
        """The tokens of a text, each with its place in the text, counted in characters.

        Tokens that are parts of one character all have the whole character.
        """
        return await asyncio.get_running_loop().run_in_executor(
            self._pool, self._encode_spans, text, add_special_tokens
        )

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of token ids; ids outside the vocabulary are left out."""
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=skip_special_tokens))

    def token_text(self, token_id: int) -> str:
        """The text of one token by itself, also of a special one."""
        return self.decode([token_id], skip_special_tokens=False)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of one token by itself, with the space in front that some decoders take from a first token."""
        token = self._tokenizer.id_to_token(token_id) or ""
        if self._is_byte_level:
            return token.encode() if self.is_special(token_id) else self._token_bytes(token_id)
        if self._is_byte(token_id):
            return bytes([int(token[3:5], 16)])
        return token.replace("\u2581", " ").encode()

    def is_special(self, token_id: int) -> bool:
        """Whether a token is one that text output leaves out."""
        return token_id in self._special_ids

    def special_id(self, text: str) -> int | None:
        """The id of the special token that is spelt so, if there is one."""
        token_id = self._tokenizer.token_to_id(text)
        return token_id if token_id in self._special_ids else None

    def new_detokenizer(self, prompt_token_ids: Sequence[int]) -> Detokenizer:
        """A decoder for what is generated after a prompt."""
        if self._is_byte_level:
            return ByteLevelDetokenizer(self._token_bytes)
        return ContextDetokenizer(
            prompt_token_ids, decode=self.decode, is_skipped=self._is_skipped, is_byte=self._is_byte
        )

    def _token_bytes(self, token_id: int) -> bytes:
        known = self._bytes_of_token.get(token_id)
        if known is None:
            known = self._bytes_of_token[token_id] = self._compute_token_bytes(token_id)
        return known

    def _compute_token_bytes(self, token_id: int) -> bytes:
        token = None if self.is_special(token_id) else self._tokenizer.id_to_token(token_id)
        if token is None:
            return b""
        # An added token may hold characters outside the alphabet; then it is plain text.
        if any(character not in BYTE_OF_CHARACTER for character in token):
            return token.encode("utf-8")
        return bytes(BYTE_OF_CHARACTER[character] for character in token)

    def _is_skipped(self, token_id: int) -> bool:
        return self.is_special(token_id) or self._tokenizer.id_to_token(token_id) is None

    def _is_byte(self, token_id: int) -> bool:
        if not self._has_byte_tokens:
            return False
        token = self._tokenizer.id_to_token(token_id) or ""
        return len(token) == 6 and token.startswith("<0x") and token.endswith(">")

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown(wait=False, cancel_futures=True)
