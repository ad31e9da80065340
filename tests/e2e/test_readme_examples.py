"""The README's requests work as printed: curl blocks, and Python blocks that use the released client."""

import re
import subprocess
import sys

import pytest
from demo_server import REPOSITORY, LaunchedServer, environment

README = (REPOSITORY / "README.md").read_text()
ADDRESS = "127.0.0.1:3000"
BLOCKS = re.findall(r"^```(bash|python)\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
CURLS = [text for language, text in BLOCKS if language == "bash" and text.startswith("curl")]
SCRIPTS = [text for language, text in BLOCKS if language == "python" and "InferenceClient" in text]

pytestmark = pytest.mark.slow


def output_of(command: list[str]) -> str:
    run = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, run.stderr
    return run.stdout


def for_server(block: str, server: LaunchedServer) -> str:
    assert ADDRESS in block
    return block.replace(ADDRESS, server.url.removeprefix("http://"))


def test_there_are_examples_of_both_kinds() -> None:
    assert CURLS and SCRIPTS


@pytest.mark.parametrize("block", CURLS)
def test_a_curl_command_is_answered_with_a_text(block: str, demo_server: LaunchedServer) -> None:
    said = output_of(["bash", "-c", for_server(block, demo_server)])
    assert '"generated_text":"' in said.replace(": ", ":")
    assert '"error"' not in said


@pytest.mark.parametrize("block", SCRIPTS)
def test_a_script_prints_what_the_adapters_say(block: str, demo_server: LaunchedServer) -> None:
    said = output_of([sys.executable, "-c", for_server(block, demo_server)])
    assert "Yo ho ho!" in said
