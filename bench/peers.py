"""The servers under load: loraplex, and the peers it is measured against, started and stopped here."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from load import Answer, Dialect, Run, run_closed, run_open
from workload import Request

START_TIMEOUT_S = 300
STOP_TIMEOUT_S = 30
BENCH = Path(__file__).parent


class PeerFailed(Exception):
    """A process did not start or died; the message has the end of its log."""


class Target(Protocol):
    """Anything that can be given a load."""

    name: str

    def run(self, requests: list[Request], num_tokens: int, concurrency: int) -> Run:
        """Answer the requests, so many at a time."""

    def stop(self) -> None:
        """End what was started."""


class Process:
    """A child in a session of its own, with its output in a temporary file."""

    def __init__(self, name: str, command: list[str], environment: dict[str, str], **pipes: Any):
        self.name = name
        self._log = tempfile.NamedTemporaryFile(prefix=f"bench-{name}-", suffix=".log")  # noqa: SIM115 (as long as it)
        self.popen = subprocess.Popen(
            command,
            env={**os.environ, **environment},
            stdout=pipes.get("stdout", self._log),
            stderr=self._log,
            stdin=pipes.get("stdin", subprocess.DEVNULL),
            start_new_session=True,
        )

    def failure(self, what: str) -> PeerFailed:
        """An error with the last lines of the log."""
        lines = Path(self._log.name).read_text(errors="replace").splitlines()[-15:]
        return PeerFailed(f"{self.name} {what}\n  " + "\n  ".join(lines))

    def stop(self) -> None:
        """Ask it to end; after a while, end it and its children."""
        if self.popen.poll() is None:
            self.popen.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.popen.wait(STOP_TIMEOUT_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.popen.pid, signal.SIGKILL)
        self.popen.wait()
        self._log.close()


@dataclass(slots=True)
class HttpTarget:
    """A server that answers over HTTP; `process` is absent where someone else started it."""

    name: str
    dialect: Dialect
    port: int
    host: str = "127.0.0.1"
    process: Process | None = None

    def wait_until_ready(self) -> None:
        """Return when /health answers 200; PeerFailed when the process ends or time is up."""
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            with contextlib.suppress(urllib.error.URLError, OSError):
                urllib.request.urlopen(f"http://{self.host}:{self.port}/health", timeout=5).close()
                return
            if self.process is not None and self.process.popen.poll() is not None:
                raise self.process.failure(f"ended with code {self.process.popen.returncode} before it was ready")
            time.sleep(0.2)
        if self.process is None:
            raise PeerFailed(f"{self.name}: no answer from {self.host}:{self.port}")
        raise self.process.failure(f"was not ready after {START_TIMEOUT_S} s")

    def run(self, requests: list[Request], num_tokens: int, concurrency: int) -> Run:
        """Answer the requests, so many at a time."""
        return run_closed(self.host, self.port, self.dialect, requests, num_tokens, concurrency)

    def run_at_rate(self, requests: list[Request], num_tokens: int, rate: float) -> Run:
        """Answer requests that come at random times, so many a second."""
        return run_open(self.host, self.port, self.dialect, requests, num_tokens, rate)

    def stop(self) -> None:
        """End the process, if it is ours."""
        if self.process is not None:
            self.process.stop()


class OneByOne:
    """transformers + peft in a process of its own, idle between its turns; concurrency means nothing to it."""

    name = "transformers+peft"

    def __init__(self, model: str, adapters: dict[str, str], threads: int):
        command = [sys.executable, str(BENCH / "one_by_one.py"), "--model", model, "--threads", str(threads)]
        for name, path in adapters.items():
            command += ["--adapter", f"{name}={path}"]
        environment = {"OMP_NUM_THREADS": str(threads), "GOMP_SPINCOUNT": os.environ.get("GOMP_SPINCOUNT", "2000")}
        self._process = Process(self.name, command, environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def wait_until_ready(self) -> None:
        """Return when the model is loaded."""
        self._read()

    def run(self, requests: list[Request], num_tokens: int, concurrency: int) -> Run:
        """Answer the requests, one after another."""
        work = {"requests": [[request.prompt, request.adapter] for request in requests], "num_tokens": num_tokens}
        started = time.perf_counter()
        stdin = self._process.popen.stdin
        assert stdin is not None
        stdin.write(json.dumps(work).encode() + b"\n")
        stdin.flush()
        times = self._read()
        duration_s = time.perf_counter() - started
        return Run([Answer(token_times, len(token_times)) for token_times in times], duration_s)

    def stop(self) -> None:
        """End the process."""
        self._process.stop()

    def _read(self) -> Any:
        stdout = self._process.popen.stdout
        assert stdout is not None
        line = stdout.readline()
        if not line:
            raise self._process.failure("ended")
        return json.loads(line)


def loraplex(model: str, adapters: dict[str, str], arguments: list[str]) -> HttpTarget:
    """This project's server, on a free port of loopback."""
    port = _free_port()
    command = [sys.executable, "-m", "loraplex", "serve", "--model-id", model, "--hostname", "127.0.0.1"]
    command += ["--port", str(port)]
    if adapters:
        command += ["--lora-adapters", ",".join(f"{name}={path}" for name, path in adapters.items())]
    process = Process("loraplex", [*command, *arguments], {})
    return HttpTarget("loraplex", TGI, port, process=process)


def vllm(python: str, model: str, adapters: dict[str, str], threads: int) -> HttpTarget:
    """vLLM's CPU build, started with the interpreter of its environment."""
    port = _free_port()
    command = [python, "-m", "vllm.entrypoints.cli.main", "serve", model, "--served-model-name", "base"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", "bfloat16", "--max-model-len", "1024"]
    command += ["--max-num-seqs", "16"]
    if adapters:
        command += ["--enable-lora", "--max-loras", "4", "--max-lora-rank", "16", "--lora-modules"]
        command += [f"{name}={path}" for name, path in adapters.items()]
    environment = {
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": os.environ.get("VLLM_CPU_OMP_THREADS_BIND", "auto"),
        "VLLM_NO_USAGE_STATS": "1",
        "OMP_NUM_THREADS": str(threads),
    }
    return HttpTarget("vllm", _openai({}), port, process=Process("vllm", command, environment))


def llamacpp(python: str, folder: str, adapters: list[str], threads: int, slots: int) -> HttpTarget:
    """llama.cpp's server. `folder` holds model.gguf, and NAME.gguf for each adapter."""
    port = _free_port()
    command = [python, str(BENCH / "llamacpp_server.py"), "--model", f"{folder}/model.gguf", "--port", str(port)]
    command += ["--threads", str(threads), "--slots", str(slots)]
    for name in adapters:
        command += ["--lora", f"{folder}/{name}.gguf"]
    scales = {
        chosen: {"lora": [{"id": i, "scale": float(name == chosen)} for i, name in enumerate(adapters)]}
        for chosen in (None, *adapters)
    }
    return HttpTarget("llama.cpp", _openai(scales), port, process=Process("llama.cpp", command, {}))


def _tgi_body(request: Request, num_tokens: int) -> dict[str, Any]:
    parameters: dict[str, Any] = {"max_new_tokens": num_tokens, "do_sample": False, "ignore_eos_token": True}
    if request.adapter is not None:
        parameters["adapter_id"] = request.adapter
    return {"inputs": request.prompt, "parameters": parameters}


TGI = Dialect(
    path="/generate_stream",
    body=_tgi_body,
    is_token=lambda event: "token" in event,
    count=lambda event: None,
)


def _openai(fields: dict[str | None, dict[str, Any]]) -> Dialect:
    """Completions, with more fields for each adapter, or else the adapter as the model."""

    def body(request: Request, num_tokens: int) -> dict[str, Any]:
        return {
            "model": "base" if fields else request.adapter or "base",
            "prompt": request.prompt,
            "max_tokens": num_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
            **fields.get(request.adapter, {}),
        }

    return Dialect(
        path="/v1/completions",
        body=body,
        is_token=lambda event: bool(event.get("choices")) and event["choices"][0].get("text", "") != "",
        count=lambda event: (event.get("usage") or {}).get("completion_tokens"),
    )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
