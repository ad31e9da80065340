"""`AdapterFetcher`: brings adapters in threads, each once however many ask, and does not repeat what was refused."""

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from loraplex_server.adapter_intake import AdapterIntake, BroughtAdapter, timed_out
from loraplex_server.adapter_location import AdapterLocation
from loraplex_server.adapter_origin import AdapterOrigin
from loraplex_server.errors import AdapterUnavailable, LoraplexError, Overloaded

# How long a refusal is remembered, so that a flood of requests for it asks the source once.
REFUSAL_TTL_S = 60.0
# The same for a source that is down: as long as clients are told to wait.
UNAVAILABLE_TTL_S = 5.0
MAX_REFUSALS = 4_096
# Adapters on their way, with those that wait for their turn.
MAX_FLIGHTS = 1_024

Wanted = AdapterLocation | AdapterOrigin
Key = tuple[Wanted, str | None]


@dataclass(frozen=True, slots=True)
class _Refusal:
    error: LoraplexError
    until: float


class AdapterFetcher:
    """Runs an intake's work off the event loop. Only the event loop's thread may use a fetcher."""

    def __init__(
        self,
        intake: AdapterIntake,
        *,
        max_fetches: int,
        timeout_s: float,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._intake = intake
        self._timeout_s = timeout_s
        self._clock = clock
        self._threads = ThreadPoolExecutor(max_fetches, thread_name_prefix="adapter-fetch")
        self._flights: dict[Key, asyncio.Task[BroughtAdapter]] = {}
        self._refusals: OrderedDict[Key, _Refusal] = OrderedDict()

    @property
    def num_on_their_way(self) -> int:
        """Adapters that are being fetched or wait for their turn."""
        return len(self._flights)

    async def fetch(self, name: str, location: Wanted, token: str | None) -> BroughtAdapter:
        """The adapter, brought and checked. All who ask meanwhile share one fetch, and its failure.

        Raises AdapterError; Overloaded when very many are on their way. One who leaves does not end the fetch.
        """
        key = (location, self._intake.scope_of(token))
        refusal = self._refusals.get(key)
        if refusal is not None and self._clock() < refusal.until:
            raise refusal.error.with_traceback(None)
        flight = self._flights.get(key)
        if flight is None:
            if len(self._flights) >= MAX_FLIGHTS:
                raise Overloaded(f"{MAX_FLIGHTS} adapters are on their way to this server already")
            flight = asyncio.create_task(self._run(key, name, token))
            self._flights[key] = flight
            # Where everybody has left, nobody looks at how it ended.
            flight.add_done_callback(lambda done: done.cancelled() or done.exception())
        return await asyncio.shield(flight)

    def forget_refusal(self, location: AdapterLocation) -> None:
        """Ask the source again next time: somebody has changed something."""
        for key in [key for key in self._refusals if key[0] == location]:
            del self._refusals[key]

    def close(self) -> None:
        """End what is on its way."""
        self._intake.close()
        for flight in self._flights.values():
            flight.cancel()
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _run(self, key: Key, name: str, token: str | None) -> BroughtAdapter:
        deadline = time.monotonic() + self._timeout_s
        try:
            async with asyncio.timeout(self._timeout_s):
                brought = await asyncio.get_running_loop().run_in_executor(
                    self._threads, self._intake.bring, name, key[0], token, deadline
                )
        except TimeoutError:
            # Its thread ends with the next piece that arrives, or when none does.
            error = timed_out(name, self._timeout_s)
            self._remember(key, error)
            raise error from None
        except LoraplexError as error:
            self._remember(key, error)
            raise
        finally:
            del self._flights[key]
        self._refusals.pop(key, None)
        return brought

    def _remember(self, key: Key, error: LoraplexError) -> None:
        ttl = UNAVAILABLE_TTL_S if isinstance(error, AdapterUnavailable) else REFUSAL_TTL_S
        self._refusals[key] = _Refusal(error, self._clock() + ttl)
        self._refusals.move_to_end(key)
        while len(self._refusals) > MAX_REFUSALS:
            self._refusals.popitem(last=False)
