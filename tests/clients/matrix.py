"""The released clients against the demo in real processes: one row each, pass or fail, as a table.

    python tests/clients/matrix.py                     build what is missing, serve the demo, run every row
    python tests/clients/matrix.py --only litellm      the clients whose names hold this
    python tests/clients/matrix.py --url http://…      against a server that runs already

Ends with 0 when every row has passed. The environments are built from the package index and kept in .cache/clients.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from environments import clean_environment, node_folder, python_of

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from demo_server import LaunchedServer  # noqa: E402  # helpers of the tests, one folder up
from documented import ADDRESS, blocks_of  # noqa: E402

# Client → environment and script.
CLIENTS = {
    "huggingface_hub": ("own", "huggingface_hub_rows.py"),
    "openai": ("own", "openai_rows.py"),
    "openai-agents": ("agents", "agents_rows.py"),
    "lorax-client": ("legacy", "lorax_client_rows.py"),
    "text-generation": ("legacy", "text_generation_rows.py"),
    "langchain": ("langchain", "langchain_rows.py"),
    "litellm": ("litellm", "litellm_rows.py"),
    "javascript": ("node", "javascript_rows.mjs"),
}
# Heading of docs/clients.md → client; those that are not here are run by the normal tests.
DOCUMENTED = {
    "OpenAI Agents SDK": "openai-agents",
    "lorax-client": "lorax-client",
    "text-generation": "text-generation",
    "LangChain": "langchain",
    "LiteLLM": "litellm",
    "JavaScript": "javascript",
}
SCRIPT_TIMEOUT_S = 600
SERVER_FLAGS = ("--num-threads", "1", "--enable-prefill-logprobs")


@contextmanager
def served_demo(*flags: str) -> Iterator[str]:
    """The address of a demo of its own."""
    with tempfile.TemporaryDirectory() as folder:
        server = LaunchedServer(Path(folder, "log"), "demo", *SERVER_FLAGS, *flags)
        try:
            yield server.wait_ready().url
            assert server.stop() == 0, server.said
        finally:
            server.end_by_force()


def command_of(client: str) -> list[str] | None:
    """What runs a client's rows; None where it cannot run."""
    environment, script = CLIENTS[client]
    if environment != "node":
        return [python_of(environment), str(HERE / script)]
    folder = node_folder()
    if folder is None:
        return None
    # Node looks for packages beside the script.
    return ["node", shutil.copy(HERE / script, folder / script)]


def run_rows(client: str, url: str, wanted: str = "") -> list[dict[str, object]]:
    """The rows of one client."""
    command = command_of(client)
    if command is None:
        return [{"row": "every row", "ok": False, "why": "node and npm are not there"}]
    run = subprocess.run(
        [*command, url, wanted], capture_output=True, text=True, timeout=SCRIPT_TIMEOUT_S, check=False,
        env=clean_environment(),
    )  # fmt: skip
    found = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]
    if run.returncode:
        found.append({"row": "the script", "ok": False, "why": run.stderr[-600:]})
    return found


def run_documented(client: str, url: str) -> list[dict[str, object]]:
    """The client's examples of docs/clients.md."""
    rows: list[dict[str, object]] = []
    for heading, _, text in blocks_of("clients.md"):
        if DOCUMENTED.get(heading) != client:
            continue
        block = text.replace(ADDRESS, url.removeprefix("http://"))
        environment, _ = CLIENTS[client]
        folder = node_folder() if environment == "node" else None
        if folder is not None:
            (folder / "documented.mjs").write_text(block)
            command = ["node", str(folder / "documented.mjs")]
        elif environment == "node":
            continue
        else:
            command = [python_of(environment), "-c", block]
        run = subprocess.run(
            command, capture_output=True, text=True, timeout=SCRIPT_TIMEOUT_S, check=False, env=clean_environment()
        )
        is_said = run.returncode == 0 and bool(run.stdout.strip())
        rows.append(
            {"row": "the example of docs/clients.md", "ok": is_said, "why": "" if is_said else run.stderr[-600:]}
        )
    return rows


def main() -> int:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", help="a running demo")
    parser.add_argument("--only", default="", help="part of the client's name")
    parser.add_argument("--row", default="", help="part of the row's name")
    asked = parser.parse_args()
    clients = [name for name in CLIENTS if asked.only in name]
    num_failed = num_rows = 0

    def run_all(url: str) -> None:
        nonlocal num_failed, num_rows
        for client in clients:
            for found in run_rows(client, url, asked.row) + ([] if asked.row else run_documented(client, url)):
                num_rows += 1
                num_failed += not found["ok"]
                print(f"{'pass' if found['ok'] else 'FAIL'}  {client:16} {found['row']:42} {found['why']}", flush=True)

    if asked.url:
        run_all(asked.url)
    else:
        with served_demo() as url:
            run_all(url)
    print(f"{num_rows - num_failed} of {num_rows} rows pass")
    return int(num_failed > 0)


if __name__ == "__main__":
    sys.exit(main())
