"""Entry point of the API process: the socket, the tokenizer, the link, uvicorn; ready, drain, the end."""

import asyncio
import contextlib
import errno
import logging
import signal
import socket
from collections.abc import Iterator
from enum import IntEnum
from pathlib import Path

import uvicorn
import uvloop

from loraplex_server.api.adapter_finder import build_finder
from loraplex_server.api.admission import Admission
from loraplex_server.api.app import build_app
from loraplex_server.api.client import EngineClient
from loraplex_server.api.generation import Generator
from loraplex_server.api.guide_checker import GuideChecker
from loraplex_server.api.http_protocol import MAX_HEADER_BYTES, HttpProtocol
from loraplex_server.api.state import ApiState, Serving
from loraplex_server.config import ApiConfig, ServeConfig
from loraplex_server.control import ControlLine
from loraplex_server.errors import GenerationFailed, LoraplexError
from loraplex_server.garbage import keep_what_is_loaded
from loraplex_server.link import ApiLink
from loraplex_server.metrics import Metrics
from loraplex_server.text.chat_template import ChatTemplate, ChatTemplateError
from loraplex_server.text.guide_check import Setup
from loraplex_server.text.tokenizer import Tokenizer, TokenizerError

logger = logging.getLogger(__name__)

# Longer than the idle time of usual load balancers, so that they close first.
KEEP_ALIVE_S = 75
# How long the last words of failed requests may take to reach their clients.
LAST_WORDS_S = 2
BACKLOG = 2048


class ExitCode(IntEnum):
    """How the process ended."""

    DRAINED = 0
    FAILED = 1


class BindError(Exception):
    """The address cannot be listened on; the message says why and what to do."""


def run(config: ServeConfig, control: ControlLine) -> int:
    """The life of the API process; returns its exit code."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the supervisor stops us in order
    try:
        listener = listen(config.api)
    except BindError as error:
        control.send("failed", error=str(error))
        return ExitCode.FAILED
    return uvloop.run(_serve(config, control, listener))


async def _serve(config: ServeConfig, control: ControlLine, listener: socket.socket) -> int:
    return await _ApiProcess(config, control, listener).run()


def listen(config: ApiConfig) -> socket.socket:
    """Take the port. Raises BindError."""
    where = f"{config.hostname}:{config.port}"
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            config.hostname, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (OSError, UnicodeError, OverflowError) as error:
        raise BindError(f"cannot listen on {where}: '{config.hostname}' is no address (--hostname): {error}") from None
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
    except (OSError, OverflowError) as error:
        listener.close()
        raise BindError(f"cannot listen on {where}: {_bind_problem(error)}") from None
    listener.setblocking(False)
    return listener


def _load_chat_template(folder: str, api: ApiConfig) -> ChatTemplate | None:
    """The template of the model's chats, if it has one. Raises TokenizerError where the operator's own is broken."""
    try:
        return ChatTemplate.load(folder, api.tokenizer_config_path, api.chat_template)
    except ChatTemplateError as error:
        if api.chat_template is not None:
            raise TokenizerError(f"--chat-template: {error}") from None
        # Every route but chat serves without it, and chat says that there is none.
        logger.warning("no chat: %s", error)
        return None


def _bind_problem(error: Exception) -> str:
    match getattr(error, "errno", None):
        case errno.EADDRINUSE:
            return "the port is in use; stop the other server or choose another port (--port)"
        case errno.EACCES | errno.EPERM:
            return "this user may not; choose a port above 1023 (--port)"
        case errno.EADDRNOTAVAIL:
            return "this machine does not have that address (--hostname)"
        case _:
            return f"{error} (--hostname, --port)"


class _Server(uvicorn.Server):
    """Uvicorn without its own signal handling, which would end the process by the signal and not by an exit code."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave the signals alone."""
        yield


class _ApiProcess:
    """Wires the parts together and answers signals and the supervisor."""

    def __init__(self, config: ServeConfig, control: ControlLine, listener: socket.socket):
        self._config = config
        self._control = control
        self._listener = listener
        self._port = int(listener.getsockname()[1])
        self._exit_code = ExitCode.DRAINED
        self._metrics = Metrics(config.api.model_id)
        self._link = ApiLink(config.link_address)
        self._client = EngineClient(
            self._link, self._metrics.observe_stats, lambda status: self._adapters.observe(status)
        )
        self._adapters = build_finder(config, self._client.tell)
        self._state = ApiState(config, self._adapters, self._metrics)
        self._guides: GuideChecker | None = None
        self._server = _Server(
            uvicorn.Config(
                build_app(self._state),
                http=HttpProtocol,
                ws="none",
                lifespan="off",
                access_log=False,
                log_config=None,
                log_level="warning",
                server_header=False,
                timeout_keep_alive=KEEP_ALIVE_S,
                h11_max_incomplete_event_size=MAX_HEADER_BYTES,
                backlog=BACKLOG,
                # Our own deadline comes first and gives the requests a last word.
                timeout_graceful_shutdown=config.api.graceful_termination_timeout + 2 * LAST_WORDS_S,
            )
        )

    async def run(self) -> int:
        """Serve until SIGTERM, the engine's loss or the supervisor's end."""
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, self._stop)
        loop.add_reader(self._control.fileno(), self._read_control)
        carrying = asyncio.create_task(self._client.run())
        carrying.add_done_callback(self._carrying_ended)
        self._starting = asyncio.create_task(self._start())
        self._starting.add_done_callback(self._starting_ended)
        try:
            await self._server.serve(sockets=[self._listener])
        finally:
            loop.remove_reader(self._control.fileno())
            for task in (self._starting, carrying):
                task.cancel()
            await asyncio.gather(self._starting, carrying, return_exceptions=True)
            if self._guides is not None:
                await self._guides.close()
            self._adapters.close()
            self._link.close()
        return self._exit_code

    async def _start(self) -> None:
        """Become ready: the port is open meanwhile and /health answers 503."""
        api, engine = self._config.api, self._config.engine
        tokenizer = await asyncio.to_thread(
            Tokenizer.load, engine.model_path, api.validation_workers, api.tokenizer_config_path
        )
        chat_template = await asyncio.to_thread(_load_chat_template, engine.model_path, api)
        self._text = tokenizer, chat_template
        await self._start_serving()
        keep_what_is_loaded()
        self._control.send("ready", port=self._port)

    async def _start_serving(self) -> None:
        """Serve as soon as the engine is ready, the first one or one that takes its place."""
        tokenizer, chat_template = self._text
        api = self._config.api
        limits = await self._client.ready()
        self._metrics.set_limits(limits)
        if self._guides is None and not api.disable_grammar_support:
            path = str(Path(self._config.engine.model_path) / "tokenizer.json")
            self._guides = GuideChecker(Setup(path, limits.vocab_size, limits.end_token_ids))
        admission = Admission(
            api,
            limits,
            tokenizer,
            self._adapters,
            prefill_logprobs=self._config.engine.enable_prefill_logprobs,
            check_guide=self._guides.check if self._guides is not None else None,
        )
        generator = Generator(admission, self._client, tokenizer, self._metrics)
        self._state.start_serving(
            Serving(
                generator,
                limits,
                chat_template,
                api.tool_call_parser,
                reasoning_parser=api.reasoning_parser,
                adapters_bring_templates=api.adapter_chat_templates,
            )
        )

    def _engine_restarts(self) -> None:
        """The engine is gone: its requests end with an error, and others wait for the next one."""
        self._client.engine_lost(
            GenerationFailed("Server error: the engine was lost and is started again"), self._adapters.meet_new_engine
        )
        self._metrics.engine_lost()
        self._state.engine_lost()
        self._starting.cancel()
        self._starting = asyncio.create_task(self._start_serving())
        self._starting.add_done_callback(self._starting_ended)

    def _starting_ended(self, task: asyncio.Task[None]) -> None:
        if task.cancelled() or task.exception() is None:
            return
        error = task.exception()
        if isinstance(error, TokenizerError):
            self._control.send("failed", error=str(error))
        else:
            logger.error("the API process could not start", exc_info=error)
            self._control.send("failed", error=f"the API process could not start: {error!r}")
        self._fail(GenerationFailed("the server could not start"))

    def _carrying_ended(self, task: asyncio.Task[None]) -> None:
        if task.cancelled() or task.exception() is None:
            return
        logger.error("the link to the engine broke", exc_info=task.exception())
        self._control.send("failed", error=f"the link to the engine broke: {task.exception()!r}")
        self._fail(GenerationFailed("the link to the engine broke"))

    def _read_control(self) -> None:
        for message in self._control.receive():
            if message["event"] == "ping":
                self._control.send("pong", **{key: value for key, value in message.items() if key != "event"})
            elif message["event"] == "engine_restarts":
                self._engine_restarts()
            elif message["event"] == "engine_lost":
                self._fail(GenerationFailed("Server error: the engine has stopped"))
        if self._control.is_closed:
            asyncio.get_running_loop().remove_reader(self._control.fileno())
            self._fail(GenerationFailed("Server error: the server is going down"))

    def _stop(self) -> None:
        """SIGTERM: the first lets running requests finish, the second does not."""
        if self._state.phase in ("stopping", "failed"):
            self._end_requests(GenerationFailed("Server error: the server is stopping"))
            return
        self._state.phase = "stopping"
        timeout = self._config.api.graceful_termination_timeout
        logger.info("stopping: %d requests have %d s to finish", self._client.num_in_flight, timeout)
        late = GenerationFailed(f"Server error: the server is stopping; {timeout} s to finish have passed")
        asyncio.get_running_loop().call_later(timeout, self._end_requests, late)
        self._server.should_exit = True

    def _fail(self, error: LoraplexError) -> None:
        """Nothing can be served any more: say so to every request, then end."""
        self._exit_code = ExitCode.FAILED
        self._state.phase = "failed"
        self._end_requests(error)
        self._server.should_exit = True

    def _end_requests(self, error: LoraplexError) -> None:
        self._client.fail_all(error)
        asyncio.get_running_loop().call_later(LAST_WORDS_S, self._force_exit)

    def _force_exit(self) -> None:
        """Cut what is still open: a client that does not read must not keep the process."""
        self._server.force_exit = True
        for connection in list(self._server.server_state.connections):
            connection.transport.abort()
