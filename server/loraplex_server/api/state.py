"""What the routes share: the configuration, and the generator once the engine is ready."""

import asyncio
from typing import Literal

from loraplex_server.api.adapter_finder import AdapterFinder
from loraplex_server.api.generation import Generator
from loraplex_server.config import ServeConfig
from loraplex_server.errors import NotReady
from loraplex_server.messages import EngineReady
from loraplex_server.metrics import Metrics
from loraplex_server.text.chat_template import ChatTemplate

# A request that comes before the engine is ready is held back so long, for clients that retry a 503 at once.
HOLD_BACK_S = 1.0


class Serving:
    """All that a ready server has."""

    __slots__ = ("chat_template", "generator", "limits")

    def __init__(self, generator: Generator, limits: EngineReady, chat_template: ChatTemplate | None = None):
        self.generator = generator
        self.limits = limits
        self.chat_template = chat_template  # None: the model has none that can be used


class ApiState:
    """The life of the API process: loading → ready → stopping or failed."""

    def __init__(self, config: ServeConfig, adapters: AdapterFinder, metrics: Metrics):
        self.config = config
        self.adapters = adapters
        self.metrics = metrics
        self.phase: Literal["loading", "ready", "stopping", "failed"] = "loading"
        self._serving: asyncio.Future[Serving] = asyncio.get_running_loop().create_future()

    def start_serving(self, serving: Serving) -> None:
        """The engine is ready."""
        if self.phase == "loading":
            self.phase = "ready"
        self._serving.set_result(serving)

    @property
    def is_healthy(self) -> bool:
        """Whether new requests should come here."""
        return self.phase == "ready"

    @property
    def limits(self) -> EngineReady | None:
        """The engine's limits, once they are known."""
        return self._serving.result().limits if self._serving.done() else None

    @property
    def compute_type(self) -> str:
        """What the answers' x-compute-type says."""
        if self.config.api.compute_type:
            return self.config.api.compute_type
        limits = self.limits
        return "cpu+optimized" if limits is not None and limits.device == "cpu" else "gpu+optimized"

    async def serving(self) -> Serving:
        """What an inference route needs; refused while loading (after a moment) and when the engine is gone."""
        if self.phase == "loading":
            try:
                async with asyncio.timeout(HOLD_BACK_S):
                    return await asyncio.shield(self._serving)
            except TimeoutError as error:
                raise NotReady("the model is still loading; /health answers 200 when it is ready") from error
        if self.phase == "failed" or not self._serving.done():
            raise NotReady("the server is going down")
        return self._serving.result()
