"""`EngineArgs` and `LLMEngine`: requests added and steps taken by the caller, as vLLM's scripts write it."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from loraplex.llm import LLM, OpenRequest
from loraplex.lora_request import LoRARequest
from loraplex.outputs import RequestOutput
from loraplex.prompts import PromptType
from loraplex.sampling_params import SamplingParams
from loraplex_server.text.tokenizer import Tokenizer


class EngineArgs:
    """The arguments of an engine: the model and whatever `LLM` takes by name."""

    def __init__(self, model: str, **arguments: Any):
        self.model = model
        self.arguments = arguments


@dataclass(slots=True)
class _Running:
    """A request and its sequences that have not ended."""

    request: OpenRequest
    num_open: int


class LLMEngine:
    """An engine that its caller feeds and steps. One thread at a time may use it; for batches `LLM` is simpler."""

    def __init__(self, llm: LLM):
        self._llm = llm
        self._running: dict[str, _Running] = {}
        self._id_of_job: dict[str, str] = {}  # a sequence's own id → the request's

    @classmethod
    def from_engine_args(cls, engine_args: EngineArgs) -> "LLMEngine":
        """An engine of its own, as `LLM(model, ...)` would make it."""
        return cls(LLM(engine_args.model, **engine_args.arguments))

    def add_request(
        self,
        request_id: str,
        prompt: PromptType,
        params: SamplingParams,
        *,
        lora_request: LoRARequest | None = None,
    ) -> None:
        """Let a prompt be served with the next steps. Raises as `LLM.generate`, and ValueError for an id in use."""
        if request_id in self._running:
            raise ValueError(f"request_id {request_id!r} is in use")
        request = self._llm.open_request(prompt, params, lora_request)
        self._running[request_id] = _Running(request, len(request.jobs))
        for job in request.jobs:
            self._id_of_job[job.request.request_id] = request_id
            self._llm.engine.submit(job)

    def step(self) -> list[RequestOutput]:
        """One step; returns the requests that have ended with it. Those that go on are not told of."""
        ended: list[RequestOutput] = []
        if not self._running:
            return ended
        for job in self._llm.engine.step():
            request_id = self._id_of_job.pop(job.request.request_id)
            running = self._running[request_id]
            running.num_open -= 1
            if not running.num_open:
                del self._running[request_id]
                ended.append(replace(self._llm.output_of(running.request), request_id=request_id))
        return ended

    def abort_request(self, request_id: str | Iterable[str]) -> None:
        """Let a request, or several, go on no more; ids that are not known are passed over."""
        for one in [request_id] if isinstance(request_id, str) else list(request_id):
            running = self._running.pop(one, None)
            if running is None:
                continue
            ids = {job.request.request_id for job in running.request.jobs}
            self._llm.engine.cancel(ids)
            for job_id in ids:
                self._id_of_job.pop(job_id, None)

    def has_unfinished_requests(self) -> bool:
        """Whether a request has not ended."""
        return bool(self._running)

    def get_num_unfinished_requests(self) -> int:
        """How many requests have not ended."""
        return len(self._running)

    def get_tokenizer(self) -> Tokenizer:
        """The model's tokenizer."""
        return self._llm.get_tokenizer()

    def close(self) -> None:
        """End the threads; nothing can be generated any more."""
        self._llm.close()
