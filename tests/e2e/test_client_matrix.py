"""The rows of the client matrix whose clients live beside ours; tests/clients/matrix.py runs the others too."""

import json
import subprocess
import sys

import pytest
from demo_server import REPOSITORY, LaunchedServer

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("script", ["huggingface_hub_rows.py", "openai_rows.py"])
def test_every_row_of_a_released_client_passes(script: str, demo_server: LaunchedServer) -> None:
    command = [sys.executable, str(REPOSITORY / "tests" / "clients" / script), demo_server.url]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, run.stderr
    rows = [json.loads(line) for line in run.stdout.splitlines()]
    assert len(rows) >= 13
    assert [row for row in rows if not row["ok"]] == []
