"""The API over the tests' scripted engine on a free port, until standard input ends; prints its address."""

import asyncio
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1] / "server" / "api"), str(Path(__file__).parents[1])]

from scripted_engine import ScriptedEngine, api_server  # noqa: E402  # a helper of the tests


async def serve() -> None:
    """Serve until the parent goes."""
    async with api_server(ScriptedEngine(), live=True) as server:
        print(server.base_url, flush=True)
        await asyncio.to_thread(sys.stdin.read)


asyncio.run(serve())
