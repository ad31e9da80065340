"""Guides are compiled once in a child process with limits, before the engine sees them; a bad one is refused here."""

import asyncio
import logging
import sys
from collections import OrderedDict
from contextlib import suppress

import msgspec

from loraplex_server.errors import InvalidRequest
from loraplex_server.text.guide_check import COMPILE_CPU_S, LENGTH_BYTES, TIME_IS_UP, Setup, Verdict, framed
from loraplex_server.text.guides import Guide

logger = logging.getLogger(__name__)

# The child gives up by itself after COMPILE_CPU_S; this is for one that does not run at all.
STUCK_TIMEOUT_S = 30.0
# Python, the library and the vocabulary: a second or so on a slow machine.
START_TIMEOUT_S = 60.0
# Verdicts that are remembered; each has the grammar's text, 64 kB at most.
MAX_KNOWN_VERDICTS = 256


class GuideChecker:
    """Turns guides into grammars for the engine; the child starts with the first guide and again after it broke."""

    def __init__(self, setup: Setup):
        self._setup = setup
        self._child: asyncio.subprocess.Process | None = None
        self._turn = asyncio.Lock()
        self._known: OrderedDict[Guide, Verdict] = OrderedDict()

    async def check(self, guide: Guide) -> str:
        """The guide's grammar. Raises InvalidRequest for one that does not compile, or takes too much to."""
        verdict = self._known.get(guide)
        if verdict is None:
            async with self._turn:
                verdict = self._known.get(guide) or await self._compile(guide)
            self._known[guide] = verdict
            if len(self._known) > MAX_KNOWN_VERDICTS:
                self._known.popitem(last=False)
        else:
            self._known.move_to_end(guide)
        if verdict.grammar is None:
            raise InvalidRequest(f"grammar is not valid: {verdict.error}")
        return verdict.grammar

    async def close(self) -> None:
        """End the child."""
        child, self._child = self._child, None
        if child is not None:
            if child.returncode is None:
                child.kill()
            await child.wait()

    async def _compile(self, guide: Guide) -> Verdict:
        child = self._child or await self._start()
        try:
            async with asyncio.timeout(STUCK_TIMEOUT_S):
                return await _ask(child, guide)
        except TimeoutError:
            await self.close()
            return Verdict(error=f"it has not compiled within {STUCK_TIMEOUT_S:g} s; make it simpler")
        except (OSError, asyncio.IncompleteReadError):
            with suppress(TimeoutError):
                # It has ended or is about to. A signal sent now could take its exit code from who waits for it.
                async with asyncio.timeout(STUCK_TIMEOUT_S):
                    await child.wait()
            await self.close()
            if child.returncode == -TIME_IS_UP:
                return Verdict(error=f"it takes longer than {COMPILE_CPU_S:g} s to compile; make it simpler")
            logger.warning("a grammar ended the process that compiles grammars (code %s)", child.returncode)
            return Verdict(error="it breaks the compiler, or takes more memory than it may have; make it simpler")
        except asyncio.CancelledError:
            # The client left in the middle: the answer would be taken for that of the next guide.
            await self.close()
            raise

    async def _start(self) -> asyncio.subprocess.Process:
        pipe = asyncio.subprocess.PIPE
        child = self._child = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "loraplex_server.text.guide_check", stdin=pipe, stdout=pipe
        )
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                ready = await _ask(child, self._setup)
        except (TimeoutError, OSError, asyncio.IncompleteReadError) as error:
            await self.close()
            logger.error("the process that compiles grammars did not start: %r", error)
            raise InvalidRequest("grammar is not supported: the grammar compiler does not start") from None
        except asyncio.CancelledError:
            await self.close()
            raise
        if ready.error is not None:
            await self.close()
            raise InvalidRequest(f"grammar is not supported: {ready.error}")
        return child


async def _ask(child: asyncio.subprocess.Process, message: msgspec.Struct) -> Verdict:
    assert child.stdin is not None and child.stdout is not None, "both are pipes"
    child.stdin.write(framed(message))
    await child.stdin.drain()
    length = int.from_bytes(await child.stdout.readexactly(LENGTH_BYTES))
    return msgspec.msgpack.decode(await child.stdout.readexactly(length), type=Verdict)
