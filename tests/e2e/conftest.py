"""Servers in real processes: the demo, once for all tests, and small ones of their own for tests that break them."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from demo_server import LaunchedServer
from tiny_models import make_peft_adapter, make_tiny_llama
from tiny_tokenizer import byte_tokenizer

from loraplex import demo

# One thread: beside other work it is the steadiest, and the tests' own process wants a core as well.
DEMO_FLAGS = ("--num-threads", "1", "--max-batch-total-tokens", "16384", "--max-concurrent-requests", "256")


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """The demo's model, made once in the user's cache folder."""
    return demo.prepare()


def _serving_demo(log: Path, *flags: str) -> Iterator[LaunchedServer]:
    server = LaunchedServer(log, "demo", *DEMO_FLAGS, *flags)
    try:
        yield server.wait_ready()
        assert server.stop() == 0, server.said
    finally:
        server.end_by_force()


@pytest.fixture(scope="session")
def demo_server(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LaunchedServer]:
    """`loraplex demo` as `make serve` starts it: bfloat16, with the three adapters of the repository."""
    yield from _serving_demo(tmp_path_factory.mktemp("demo") / "log")


@pytest.fixture(scope="session")
def exact_server(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LaunchedServer]:
    """The same in float32, where the rows beside a request do not change which token is the likeliest."""
    yield from _serving_demo(tmp_path_factory.mktemp("exact") / "log", "--dtype", "float32")


@pytest.fixture(scope="session")
def tiny_world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random model in `base` and adapters for it in `good` and `other`."""
    folder = tmp_path_factory.mktemp("tiny")
    tokenizer = byte_tokenizer()
    model = make_tiny_llama(
        folder / "base", vocab_size=tokenizer.get_vocab_size(), max_position_embeddings=8192, num_hidden_layers=2
    )
    tokenizer.save(str(folder / "base" / "tokenizer.json"))
    for number, name in enumerate(("good", "other")):
        make_peft_adapter(folder / name, model, rank=4, seed=number)
    return folder


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Callable[..., LaunchedServer]]:
    """Start launchers that no test outlives."""
    servers: list[LaunchedServer] = []

    def begin(*args: str) -> LaunchedServer:
        servers.append(LaunchedServer(tmp_path / f"log-{len(servers)}", *args))
        return servers[-1]

    yield begin
    for server in servers:
        server.end_by_force()


@pytest.fixture
def launch_tiny(launch: Callable[..., LaunchedServer], tiny_world: Path) -> Callable[..., LaunchedServer]:
    """Serve the random model with its adapters."""

    def begin(*flags: str) -> LaunchedServer:
        adapters = ",".join(f"{name}={tiny_world / name}" for name in ("good", "other"))
        args = ("--model-id", str(tiny_world / "base"), "--lora-adapters", adapters)
        return launch(*args, "--num-threads", "1", "--num-kv-blocks", "4096", *flags).wait_ready()

    return begin
