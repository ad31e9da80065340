"""What the routes share: the configuration, and the generator once the engine is ready."""

import asyncio
from typing import Literal

from loraplex_server.api.adapter_finder import AdapterFinder
from loraplex_server.api.adapter_templates import AdapterTemplates
from loraplex_server.api.generation import Generator
from loraplex_server.config import ServeConfig
from loraplex_server.errors import NotReady
from loraplex_server.messages import EngineReady
from loraplex_server.metrics import Metrics
from loraplex_server.text.chat_template import ChatTemplate
from loraplex_server.text.tool_formats import find_format

# A request that comes before the engine is ready is held back so long, for clients that retry a 503 at once.
HOLD_BACK_S = 1.0


class Serving:
    """All that a ready server has."""

    __slots__ = ("adapter_templates", "chat_template", "generator", "limits", "reasoning_parser", "tool_format")

    def __init__(
        self,
        generator: Generator,
        limits: EngineReady,
        chat_template: ChatTemplate | None = None,
        tool_call_parser: str = "auto",
        *,
        reasoning_parser: str = "none",
        adapters_bring_templates: bool = False,
    ):
        self.generator = generator
        self.limits = limits
        self.chat_template = chat_template  # None: the model has none that can be used
        self.adapter_templates = AdapterTemplates(chat_template) if adapters_bring_templates else None
        self.reasoning_parser = reasoning_parser
        self.tool_format = find_format(tool_call_parser, chat_template.source if chat_template else "")


class ApiState:
    """The life of the API process: loading → ready → stopping or failed; restarting while the engine is lost."""

    def __init__(self, config: ServeConfig, adapters: AdapterFinder, metrics: Metrics):
        self.config = config
        self.adapters = adapters
        self.metrics = metrics
        self.phase: Literal["loading", "ready", "restarting", "stopping", "failed"] = "loading"
        self.limits: EngineReady | None = None  # the engine's, once they are known
        self._serving: asyncio.Future[Serving] = asyncio.get_running_loop().create_future()

    def start_serving(self, serving: Serving) -> None:
        """The engine is ready."""
        if self.phase in ("loading", "restarting"):
            self.phase = "ready"
        self.limits = serving.limits
        self._serving.set_result(serving)

    def engine_lost(self) -> None:
        """The engine is gone, and `start_serving` will be called when another has taken its place."""
        if self.phase == "ready":
            self.phase = "restarting"
        if self._serving.done():
            self._serving = asyncio.get_running_loop().create_future()

    @property
    def is_healthy(self) -> bool:
        """Whether new requests should come here."""
        return self.phase == "ready"

    @property
    def compute_type(self) -> str:
        """What the answers' x-compute-type says."""
        if self.config.api.compute_type:
            return self.config.api.compute_type
        limits = self.limits
        return "cpu+optimized" if limits is not None and limits.device == "cpu" else "gpu+optimized"

    async def serving(self) -> Serving:
        """What an inference route needs; refused while loading (after a moment) and when the engine is gone."""
        if self.phase in ("loading", "restarting"):
            try:
                async with asyncio.timeout(HOLD_BACK_S):
                    return await asyncio.shield(self._serving)
            except TimeoutError as error:
                what = "model is still loading" if self.phase == "loading" else "engine was lost and is started again"
                raise NotReady(f"the {what}; /health answers 200 when it is ready") from error
        if self.phase == "failed" or not self._serving.done():
            raise NotReady("the server is going down")
        return self._serving.result()
