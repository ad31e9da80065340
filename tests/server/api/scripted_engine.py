"""A server for tests: the real app and EngineClient over a link to an engine that follows a script."""

import asyncio
import functools
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
import uvicorn

from loraplex_server.api.adapter_finder import build_finder
from loraplex_server.api.admission import Admission, GuideCheck
from loraplex_server.api.app import build_app
from loraplex_server.api.client import EngineClient
from loraplex_server.api.generation import Generator
from loraplex_server.api.http_protocol import MAX_HEADER_BYTES, HttpProtocol
from loraplex_server.api.state import ApiState, Serving
from loraplex_server.config import AdapterConfig, AdapterSourceConfig, ApiConfig, EngineConfig, ServeConfig
from loraplex_server.messages import (
    AbortRequest,
    AdapterSpec,
    EngineReady,
    EngineStats,
    FromEngine,
    GenerateRequest,
    KeepAdapter,
    LoadAdapter,
    StepOutput,
    ToEngine,
    TokenOutput,
    TopLogprob,
    UnloadAdapter,
)
from loraplex_server.metrics import Metrics
from loraplex_server.text.chat_template import ChatTemplate
from loraplex_server.text.detokenizer import ByteLevelDetokenizer
from loraplex_server.text.tokenizer import TokenSpan

DEADLINE_S = 180  # only ends a test that would wait for ever
BOS, EOS, MERGED = 256, 257, 258
SPELLINGS = {BOS: "<s>", EOS: "</s>", MERGED: "STOPafter"}

READY = EngineReady(
    max_input_tokens=40,
    max_total_tokens=60,
    max_batch_prefill_tokens=32,
    max_batch_total_tokens=640,
    max_batch_size=8,
    num_kv_blocks=40,
    block_size=16,
    vocab_size=259,
    end_token_ids=[EOS],
    dtype="float32",
    device="cpu",
    max_loras=4,
)


# The prompts of tests are short, and so is what this makes of a conversation.
CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'bad' %}{{ raise_exception('no such role') }}{% endif %}"
    "{{ m.role[0] }}:{{ m.content }}{{ eos_token }}{% endfor %}{% if add_generation_prompt %}a:{% endif %}{{ suffix }}"
)


def adapter_source(adapter_id: str) -> AdapterSpec:
    return AdapterSpec(
        adapter_id=adapter_id, path=f"/nowhere/{adapter_id}", digest=f"d-{adapter_id}", rank=8, num_bytes=1
    )


class ByteTokenizer:
    """One token a byte of UTF-8, behind a start token."""

    vocab_size = 259

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [BOS] * add_special_tokens + list(text.encode())

    async def encode_async(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return self.encode(text, add_special_tokens)

    async def encode_with_offsets(self, text: str, add_special_tokens: bool = True) -> list[TokenSpan]:
        return [TokenSpan(BOS, "", 0, 0)] * add_special_tokens + [
            TokenSpan(ord(c), c, i, i + 1) for i, c in enumerate(text)
        ]

    def token_text(self, token_id: int) -> str:
        return SPELLINGS.get(token_id) or bytes([token_id]).decode(errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        return SPELLINGS[token_id].encode() if token_id in SPELLINGS else bytes([token_id])

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        shown = [one for one in token_ids if not (skip_special_tokens and self.is_special(one))]
        return b"".join(map(self.token_bytes, shown)).decode(errors="replace")

    def special_id(self, text: str) -> int | None:
        return {spelling: token_id for token_id, spelling in SPELLINGS.items() if self.is_special(token_id)}.get(text)

    def is_special(self, token_id: int) -> bool:
        return token_id in (BOS, EOS)

    def new_detokenizer(self, prompt_token_ids: list[int]) -> ByteLevelDetokenizer:
        return ByteLevelDetokenizer(self._bytes)

    def _bytes(self, token_id: int) -> bytes:
        if token_id in (BOS, EOS):
            return b""
        return SPELLINGS[token_id].encode() if token_id in SPELLINGS else bytes([token_id])


@dataclass
class ScriptedEngine:
    """Answers every request with the tokens of its adapter's text, one a step, then the end token.

    With `gate`, a request stops before token number `gate_at` until the gate is opened.
    """

    texts: dict[str | None, str] = field(
        default_factory=lambda: {None: "hello world", "pirate": "arr", "json": '{"a": 1}'}
    )
    token_ids: list[int] | None = None
    gate: asyncio.Event | None = None
    gate_at: int = 0
    fail_at: int | None = None
    cancel_at: int | None = None
    requests: list[GenerateRequest] = field(default_factory=list)
    aborted: list[str] = field(default_factory=list)
    adapters: dict[str, AdapterSpec] = field(default_factory=dict)  # announced while it ran, by digest
    of_start: set[str] = field(default_factory=set)  # digests that it has from its configuration
    kept: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._outbox: asyncio.Queue[FromEngine] = asyncio.Queue()
        self._running: dict[str, asyncio.Task[None]] = {}

    async def send(self, message: ToEngine) -> None:
        """The API's end of the link: what the engine takes."""
        match message:
            case GenerateRequest():
                self.requests.append(message)
                self._running[message.request_id] = asyncio.create_task(self._generate(message))
            case AbortRequest(request_id=request_id):
                self.aborted.append(request_id)
                self._running[request_id].cancel()
            case LoadAdapter(spec=spec):
                assert spec.digest not in self.adapters, "an adapter is announced twice"
                self.adapters[spec.digest] = spec
            case KeepAdapter(digest=digest, is_kept=is_kept):
                assert digest in self.adapters.keys() | self.of_start and is_kept != (digest in self.kept)
                self.kept ^= {digest}
            case UnloadAdapter(digest=digest):
                assert digest in self.adapters.keys() | self.of_start, "what it does not know cannot be forgotten"
                self.adapters.pop(digest, None)
                self.of_start.discard(digest)
                self.kept.discard(digest)

    async def receive(self) -> FromEngine:
        """The API's end of the link: what the engine says."""
        return await self._outbox.get()

    def engine_lost(self) -> None:
        """The API's end of the link: nothing waits to be handed over here."""

    def say(self, message: FromEngine) -> None:
        self._outbox.put_nowait(message)

    @property
    def num_running(self) -> int:
        return sum(not task.done() for task in self._running.values())

    async def _generate(self, request: GenerateRequest) -> None:
        text = self.texts.get(request.adapter_id)
        if text is None:
            # An adapter that came while the server ran answers with its digest, if it is known.
            text = f"<{self.adapters[request.adapter_digest or ''].digest[:12]}>"
        token_ids = self.token_ids or [*text.encode(), EOS]
        sampling = request.sampling
        for i, token_id in enumerate(token_ids[: sampling.max_new_tokens]):
            if self.gate is not None and i == self.gate_at:
                await self.gate.wait()
            if self.cancel_at == i:
                self._step(TokenOutput(request_id=request.request_id, finish_reason="cancelled"))
                return
            if self.fail_at == i:
                self._step(
                    TokenOutput(request_id=request.request_id, finish_reason="error", error="Server error: boom")
                )
                return
            is_stop = token_id in sampling.stop_token_ids
            is_end = is_stop or (token_id == EOS and not sampling.ignore_eos)
            is_last = i + 1 == min(len(token_ids), sampling.max_new_tokens)
            self._step(
                TokenOutput(
                    request_id=request.request_id,
                    token_ids=[token_id],
                    logprobs=[-0.25 - (sampling.seed % 97) / 100 if sampling.do_sample else -0.25],
                    top_logprobs=[self._top(token_id, sampling.num_logprobs)] if sampling.num_logprobs else [],
                    finish_reason=("length" if i + 1 == sampling.max_new_tokens else "eos_token")
                    if is_last or is_end
                    else None,
                    prompt_logprobs=self._prompt(request) if sampling.prompt_logprobs and i == 0 else None,
                    prompt_top_logprobs=self._prompt_tops(request) if sampling.num_prompt_logprobs and i == 0 else [],
                    queue_time_s=0.001 if i == 0 else None,
                )
            )
            await asyncio.sleep(0)
            if is_stop:
                return

    @staticmethod
    def _top(token_id: int, number: int) -> list[TopLogprob]:
        return [TopLogprob(token_id, -0.25), *(TopLogprob(97 + i, float("-inf")) for i in range(number - 1))]

    @staticmethod
    def _prompt(request: GenerateRequest) -> list[float | None]:
        return [None, *(-1.0 for _ in request.prompt_token_ids[1:])]

    @staticmethod
    def _prompt_tops(request: GenerateRequest) -> list[list[TopLogprob]]:
        return [[], *([TopLogprob(ord("t"), -0.5)] for _ in request.prompt_token_ids[1:])]

    def _step(self, output: TokenOutput) -> None:
        stats = EngineStats(num_running=self.num_running, num_kv_blocks=40, num_generated_tokens=len(output.token_ids))
        self.say(StepOutput(outputs=[output], stats=stats))


@dataclass
class TestServer:
    """A running API with its scripted engine."""

    __test__ = False

    state: ApiState
    engine: ScriptedEngine
    engine_client: EngineClient
    http: httpx.AsyncClient
    admission: Admission | None
    base_url: str = "http://api"

    async def generate(self, inputs: Any = "hi", path: str = "/generate", **parameters: Any) -> httpx.Response:
        body: dict[str, Any] = {"inputs": inputs}
        if parameters:
            body["parameters"] = parameters
        return await self.http.post(path, json=body)

    async def settled(self) -> None:
        """Wait until the engine has taken all that it was told."""
        while not self.engine_client.has_sent_all:
            await asyncio.sleep(0)
        await asyncio.sleep(0)

    async def until_idle(self) -> None:
        """Wait until the engine runs nothing and all permits are back."""
        while self.engine.num_running or self.engine_client.num_in_flight or self.admission.num_permits_taken:
            await asyncio.sleep(0.005)
        await self.settled()


@functools.cache
def _template(source: str) -> ChatTemplate:
    return ChatTemplate(source, {"eos_token": ";"})


@asynccontextmanager
async def api_server(
    engine: ScriptedEngine | None = None,
    *,
    live: bool = False,
    is_ready: bool = True,
    limits: EngineReady = READY,
    prefill_logprobs: bool = False,
    chat_template: str | None = CHAT_TEMPLATE,
    adapters: tuple[str, ...] = ("pirate", "json"),
    check_guide: GuideCheck | None = None,
    sources: AdapterSourceConfig | None = None,
    model_path: str = "",
    max_lora_rank: int = 512,
    **api_settings: Any,
) -> AsyncIterator[TestServer]:
    """The API over an engine; in memory, or with `live` behind a real socket."""
    engine = engine or ScriptedEngine()
    known = tuple(adapter_source(name) for name in adapters)
    engine.of_start = {spec.digest for spec in known}
    config = ServeConfig(
        api=ApiConfig(**{"model_id": "tiny-base", **api_settings}),
        engine=EngineConfig(
            model_path=model_path,
            adapters=AdapterConfig(sources=known, max_lora_rank=max_lora_rank),
            enable_prefill_logprobs=prefill_logprobs,
        ),
        adapter_sources=sources or AdapterSourceConfig(),
    )
    metrics = Metrics(config.api.model_id)
    client = EngineClient(engine, metrics.observe_stats, lambda status: finder.observe(status))
    finder = build_finder(config, client.tell)
    state = ApiState(config, finder, metrics)
    carrying = asyncio.create_task(client.run())
    admission = None
    if is_ready:
        metrics.set_limits(limits)
        tokenizer: Any = ByteTokenizer()
        admission = Admission(
            config.api, limits, tokenizer, finder, prefill_logprobs=prefill_logprobs, check_guide=check_guide
        )
        generator = Generator(admission, client, tokenizer, metrics)
        template = _template(chat_template) if chat_template else None
        state.start_serving(
            Serving(
                generator, limits, template, config.api.tool_call_parser,
                reasoning_parser=config.api.reasoning_parser,
                adapters_bring_templates=config.api.adapter_chat_templates,
            )
        )  # fmt: skip
    app = build_app(state)
    async with (
        transport_to(app, live) as (transport, base_url),
        httpx.AsyncClient(transport=transport, base_url=base_url, timeout=DEADLINE_S) as http,
    ):
        yield TestServer(state, engine, client, http, admission, base_url)
    finder.close()
    carrying.cancel()
    await asyncio.gather(carrying, return_exceptions=True)


@asynccontextmanager
async def transport_to(app: Any, live: bool) -> AsyncIterator[tuple[httpx.AsyncBaseTransport | None, str]]:
    if not live:
        yield httpx.ASGITransport(app, raise_app_exceptions=False), "http://api"
        return
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            http=HttpProtocol,
            h11_max_incomplete_event_size=MAX_HEADER_BYTES,
            port=0,
            lifespan="off",
            log_config=None,
            log_level="critical",
            timeout_graceful_shutdown=1,
        )
    )
    server.capture_signals = _no_signals  # type: ignore[method-assign]
    serving = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.005)
    yield None, f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    await serving


class _no_signals:
    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


def with_server(test: Callable[[TestServer], Awaitable[None]], **options: Any) -> None:
    """Run a test's coroutine against a fresh server."""

    async def run() -> None:
        async with asyncio.timeout(DEADLINE_S), api_server(**options) as server:
            await test(server)

    asyncio.run(run())
