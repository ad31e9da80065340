"""The API over the tests' scripted engine on a free port, until standard input ends; prints its address."""

import asyncio
import sys
import tempfile
from pathlib import Path

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS / "server" / "api"), str(TESTS)]

from scripted_engine import ScriptedEngine, api_server  # noqa: E402  # helpers of the tests
from tiny_models import make_tiny_llama  # noqa: E402


class Texts(dict[str | None, str]):
    """What each adapter says; a merge of adapters too."""

    def __missing__(self, name: str | None) -> str:
        return f"{name}"


async def serve(folder: str) -> None:
    """Serve until the parent goes."""
    engine = ScriptedEngine(texts=Texts({None: "hello world", "pirate": "arr"}))
    async with api_server(engine, live=True, model_path=folder) as server:
        print(server.base_url, flush=True)
        await asyncio.to_thread(sys.stdin.read)


with tempfile.TemporaryDirectory() as folder:
    make_tiny_llama(folder)
    asyncio.run(serve(folder))
