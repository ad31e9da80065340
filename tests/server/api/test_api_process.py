"""The API process as the supervisor sees it: a real child over real sockets, the engine's end of the link held here."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import msgspec
import pytest
import tokenizers
from demo_server import free_port
from scripted_engine import READY, adapter_source

from loraplex_server.config import AdapterConfig, ApiConfig, EngineConfig, ServeConfig
from loraplex_server.control import ControlLine
from loraplex_server.link import EngineLink
from loraplex_server.messages import AbortRequest, GenerateRequest, LoadAdapter, StepOutput, TokenOutput

CHILD = """
import sys, msgspec
from loraplex_server.api.process import run
from loraplex_server.config import ServeConfig
from loraplex_server.control import ControlLine
config = msgspec.json.decode(sys.argv[1], type=ServeConfig)
raise SystemExit(run(config, ControlLine.from_fd(int(sys.argv[2]))))
"""
DEADLINE_S = 180


def save_byte_tokenizer(folder: Path) -> None:
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[])
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))


class Child:
    """An API process, the supervisor's end of its control line and the engine's end of its link."""

    def __init__(self, folder: Path, **api: object):
        config = ServeConfig(
            api=ApiConfig(**{"model_id": "tiny", "hostname": "127.0.0.1", "port": 0, **api}),
            engine=EngineConfig(model_path=str(folder), adapters=AdapterConfig(sources=(adapter_source("pirate"),))),
            link_address=str(folder),
        )
        ours, theirs = socket.socketpair()
        self.process = subprocess.Popen(
            [sys.executable, "-c", CHILD, msgspec.json.encode(config).decode(), str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            stderr=subprocess.PIPE,
        )
        theirs.close()
        self.control = ControlLine(ours)
        self._connection = ours
        ours.settimeout(DEADLINE_S)  # makefile wants a socket that waits
        self._lines = ours.makefile("r")
        self.engine = EngineLink(str(folder))
        self.base_url = ""

    def said(self) -> dict[str, object]:
        """The next thing that the child says on its control line."""
        self._connection.settimeout(DEADLINE_S)  # sending has made it a socket that does not wait
        return json.loads(self._lines.readline())

    def become_ready(self) -> None:
        self.engine.send(READY)
        said = self.said()
        assert said["event"] == "ready"
        self.base_url = f"http://127.0.0.1:{said['port']}"

    def taken(self, kind: type) -> object:
        """The next message of that kind on the engine's end."""
        for _ in range(DEADLINE_S * 10):
            self.engine.wait(0.1)
            for message in self.engine.receive():
                if isinstance(message, kind):
                    return message
        raise AssertionError(f"no {kind.__name__} came")

    def answer(self, request: GenerateRequest, *, token_id: int = 40, end: bool = True) -> None:
        self.engine.send(
            StepOutput(
                outputs=[
                    TokenOutput(
                        request_id=request.request_id,
                        token_ids=[token_id],
                        logprobs=[-0.5],
                        finish_reason="length" if end else None,
                    )
                ]
            )
        )

    def end(self) -> int:
        return self.process.wait(DEADLINE_S)

    def hang_up(self) -> None:
        self._lines.close()
        self.control.close()

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate()
        self.hang_up()
        self.engine.close()


@pytest.fixture
def child(tmp_path: Path) -> Iterator[Child]:
    save_byte_tokenizer(tmp_path)
    child = Child(tmp_path)
    yield child
    child.close()


class OpenStream:
    """A stream that one thread reads while the test goes on."""

    def __init__(self, child: Child):
        self.lines: list[str] = []
        self._thread = threading.Thread(target=self._read, args=(child.base_url,))
        self._thread.start()
        self.request = child.taken(GenerateRequest)

    def _read(self, base_url: str) -> None:
        with httpx.stream("POST", f"{base_url}/generate_stream", json={"inputs": "hi"}, timeout=DEADLINE_S) as response:
            self.lines = [line for line in response.iter_lines() if line.startswith("data:")]

    def events(self) -> list[dict[str, object]]:
        self._thread.join(DEADLINE_S)
        assert not self._thread.is_alive()
        return [json.loads(line.removeprefix("data: ")) for line in self.lines]


def test_it_answers_through_the_link_and_says_ready_with_its_port(child: Child) -> None:
    child.become_ready()
    assert httpx.get(f"{child.base_url}/health", timeout=DEADLINE_S).status_code == 200
    stream = OpenStream(child)
    child.answer(stream.request, end=False)
    child.answer(stream.request)
    events = stream.events()
    assert [event["index"] for event in events] == [1, 2]
    assert events[-1]["generated_text"] == events[0]["token"]["text"] * 2


def test_it_answers_a_ping_with_the_same_fields(child: Child) -> None:
    child.become_ready()
    child.control.send("ping", number=7)
    assert child.said() == {"event": "pong", "number": 7}


def test_the_port_is_open_before_the_engine_is_ready(tmp_path: Path) -> None:
    save_byte_tokenizer(tmp_path)
    child = Child(tmp_path, port=(port := free_port()))
    try:
        child.control.send("ping")
        assert child.said() == {"event": "pong"}
        for path in ("/health", "/ping", "/"):
            answer = httpx.get(f"http://127.0.0.1:{port}{path}", timeout=DEADLINE_S)
            assert (answer.status_code, answer.json()["error_type"]) == (503, "healthcheck")
        answer = httpx.post(f"http://127.0.0.1:{port}/generate", json={"inputs": "hi"}, timeout=DEADLINE_S)
        assert answer.status_code == 503
        assert int(answer.headers["retry-after"]) > 0
        assert httpx.get(f"http://127.0.0.1:{port}/metrics", timeout=DEADLINE_S).status_code == 200
        child.become_ready()
        assert httpx.get(f"http://127.0.0.1:{port}/health", timeout=DEADLINE_S).status_code == 200
    finally:
        child.close()


def test_a_port_in_use_is_one_line_with_the_fix(tmp_path: Path) -> None:
    save_byte_tokenizer(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        child = Child(tmp_path, port=port)
        said = child.said()
        assert child.end() == 1
    child.close()
    assert said["event"] == "failed"
    assert f"127.0.0.1:{port}" in said["error"]
    assert "--port" in said["error"] and "\n" not in said["error"]


def test_an_address_of_another_machine_is_one_line_with_the_fix(tmp_path: Path) -> None:
    save_byte_tokenizer(tmp_path)
    child = Child(tmp_path, hostname="203.0.113.1")
    said = child.said()
    assert child.end() == 1
    child.close()
    assert "--hostname" in said["error"]


def test_a_model_without_a_tokenizer_is_one_line(tmp_path: Path) -> None:
    child = Child(tmp_path)
    said = child.said()
    assert (said["event"], child.end()) == ("failed", 1)
    child.close()
    assert "tokenizer.json" in said["error"]


def test_a_chat_template_of_the_operators_own_that_is_broken_is_one_line(tmp_path: Path) -> None:
    save_byte_tokenizer(tmp_path)
    (tmp_path / "own.jinja").write_text("{% if %}")
    child = Child(tmp_path, chat_template=str(tmp_path / "own.jinja"))
    said = child.said()
    assert (said["event"], child.end()) == ("failed", 1)
    child.close()
    assert str(said["error"]).startswith("--chat-template: the chat template does not compile")


def test_the_engines_loss_ends_every_stream_with_an_error_and_the_process_with_1(child: Child) -> None:
    child.become_ready()
    stream = OpenStream(child)
    child.answer(stream.request, end=False)
    child.control.send("engine_lost")
    events = stream.events()
    assert events[-1]["error_type"] == "generation"
    assert events[-1]["error"].startswith("Request failed during generation: Server error: ")
    assert child.end() == 1


def statuses_until(child: Child, wanted: int) -> set[int]:
    """What /health answers, up to the first answer of that status."""
    seen: set[int] = set()
    while wanted not in seen:
        seen.add(httpx.get(f"{child.base_url}/health", timeout=DEADLINE_S).status_code)
    return seen - {wanted}


def test_an_engine_that_restarts_ends_its_streams_and_the_next_one_serves(child: Child, tmp_path: Path) -> None:
    child.become_ready()
    stream = OpenStream(child)
    child.answer(stream.request, end=False)
    child.control.send("engine_restarts")  # it hangs: what it is told from now on is read by nobody
    assert stream.events()[-1]["error_type"] == "generation"
    assert "started again" in stream.events()[-1]["error"]
    assert statuses_until(child, 503) <= {200}
    late = httpx.post(f"{child.base_url}/generate", json={"inputs": "hi"}, timeout=DEADLINE_S)
    assert (late.status_code, late.json()["error_type"]) == (503, "healthcheck")
    assert int(late.headers["retry-after"]) > 0
    child.engine.close()
    child.engine = EngineLink(str(tmp_path))
    child.engine.send(READY)
    assert statuses_until(child, 200) <= {503}
    assert child.taken(LoadAdapter) == LoadAdapter(spec=adapter_source("pirate"))
    stream = OpenStream(child)
    child.answer(stream.request)
    assert stream.events()[-1]["details"] is None and stream.events()[-1]["generated_text"]
    assert "loraplex_engine_restarts 1" in httpx.get(f"{child.base_url}/metrics", timeout=DEADLINE_S).text
    child.process.send_signal(signal.SIGTERM)
    assert child.end() == 0


def test_what_a_lost_engine_was_to_be_told_is_not_told_the_next_one(child: Child, tmp_path: Path) -> None:
    child.become_ready()
    child.engine.close()
    with ThreadPoolExecutor(1) as thread:
        # It is admitted and waits for an engine to be handed over to.
        waiting = thread.submit(httpx.post, f"{child.base_url}/generate", json={"inputs": "old"}, timeout=DEADLINE_S)
        metrics = ""
        while "tgi_request_count 1" not in metrics:
            metrics = httpx.get(f"{child.base_url}/metrics", timeout=DEADLINE_S).text
        child.control.send("engine_restarts")
        assert waiting.result().status_code in (424, 503)
    child.engine = EngineLink(str(tmp_path))
    child.engine.send(READY)
    statuses_until(child, 200)
    stream = OpenStream(child)
    assert len(stream.request.prompt_token_ids) == len("hi")
    child.answer(stream.request)
    assert stream.events()[-1]["generated_text"]


def test_the_supervisors_end_ends_the_process(child: Child) -> None:
    child.become_ready()
    child.hang_up()
    assert child.end() == 1


def test_sigterm_lets_a_stream_finish_and_exits_0(child: Child) -> None:
    child.become_ready()
    stream = OpenStream(child)
    child.answer(stream.request, end=False)
    child.process.send_signal(signal.SIGTERM)
    while True:  # until the listening socket is closed
        try:
            socket.create_connection(("127.0.0.1", int(child.base_url.rpartition(":")[2])), timeout=1).close()
        except OSError:
            break
    child.answer(stream.request)
    assert stream.events()[-1]["generated_text"] is not None
    assert child.end() == 0


def test_a_second_sigterm_ends_the_streams_at_once(child: Child) -> None:
    child.become_ready()
    stream = OpenStream(child)
    child.process.send_signal(signal.SIGTERM)
    child.control.send("ping")
    assert child.said()["event"] == "pong"  # the first signal was taken
    child.process.send_signal(signal.SIGTERM)
    assert stream.events()[-1]["error_type"] == "generation"
    assert child.end() == 0


def test_ctrl_c_is_left_to_the_supervisor(child: Child) -> None:
    child.become_ready()
    child.process.send_signal(signal.SIGINT)
    child.control.send("ping")
    assert child.said()["event"] == "pong"
    assert httpx.get(f"{child.base_url}/health", timeout=DEADLINE_S).status_code == 200


def test_requests_that_outlast_the_grace_time_get_an_error(tmp_path: Path) -> None:
    save_byte_tokenizer(tmp_path)
    child = Child(tmp_path, graceful_termination_timeout=1)
    try:
        child.become_ready()
        stream = OpenStream(child)
        child.process.send_signal(signal.SIGTERM)
        assert "1 s to finish" in stream.events()[-1]["error"]
        assert child.end() == 0
    finally:
        child.close()


def test_a_disconnect_reaches_the_engine_as_an_abort(child: Child) -> None:
    child.become_ready()
    with httpx.stream(
        "POST", f"{child.base_url}/generate_stream", json={"inputs": "hi"}, timeout=DEADLINE_S
    ) as response:
        request = child.taken(GenerateRequest)
        child.answer(request, end=False)
        next(response.iter_lines())
    assert child.taken(AbortRequest) == AbortRequest(request_id=request.request_id)


def test_the_api_process_imports_neither_torch_nor_transformers() -> None:
    code = "import sys, loraplex_server.api.process; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
