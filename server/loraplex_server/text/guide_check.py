"""A process that compiles guides for the API process, so that what breaks a compiler costs one request.

It reads a `Setup`, then guides, from its standard input and writes a `Verdict` for each; a length of four bytes, the
highest first, stands before each message. It ends with its input.
"""

import resource
import signal
import sys
from typing import BinaryIO

import msgspec
import psutil

from loraplex_server.text.guides import Guide

# On top of what the process takes with the vocabulary loaded.
MEMORY_BYTES = 512 * 1024 * 1024
# Of this process's own time, so that a good guide does not fail because the machine has other work.
COMPILE_CPU_S = 2.0
# Ends the process when that is used up; nothing in the native library would look at a flag.
TIME_IS_UP = signal.SIGPROF
LENGTH_BYTES = 4


class Setup(msgspec.Struct, frozen=True):
    """What the grammars are for."""

    tokenizer_path: str
    vocab_size: int
    end_token_ids: list[int]


class Verdict(msgspec.Struct, frozen=True):
    """A guide as a grammar that the engine can take, or why there is none; the answer to a Setup has neither."""

    grammar: str | None = None
    error: str | None = None


def framed(message: msgspec.Struct) -> bytes:
    """A message with its length in front."""
    body = msgspec.msgpack.encode(message)
    return len(body).to_bytes(LENGTH_BYTES) + body


def _read(source: BinaryIO) -> bytes | None:
    length = source.read(LENGTH_BYTES)
    return source.read(int.from_bytes(length)) if length else None


def _limit_memory() -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    limit = psutil.Process().memory_info().vms + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def main() -> None:
    """Answer until the input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; this process ends with the API's
    # The native library is imported here and not in the API process, which imports this module for its types.
    from loraplex_server.text.guide_compiler import GuideError, Vocabulary, grammar_of

    source, target = sys.stdin.buffer, sys.stdout.buffer

    def answer(verdict: Verdict) -> None:
        target.write(framed(verdict))
        target.flush()

    setup = msgspec.msgpack.decode(_read(source) or b"", type=Setup)
    try:
        vocabulary = Vocabulary(setup.tokenizer_path, setup.vocab_size, setup.end_token_ids)
    except GuideError as error:
        answer(Verdict(error=str(error)))
        return
    _limit_memory()
    answer(Verdict())
    while (body := _read(source)) is not None:
        signal.setitimer(signal.ITIMER_PROF, COMPILE_CPU_S)
        try:
            grammar = grammar_of(msgspec.msgpack.decode(body, type=Guide))
            vocabulary.matcher(grammar)
            verdict = Verdict(grammar=grammar)
        except GuideError as error:
            verdict = Verdict(error=str(error))
        signal.setitimer(signal.ITIMER_PROF, 0)
        answer(verdict)


if __name__ == "__main__":
    main()
