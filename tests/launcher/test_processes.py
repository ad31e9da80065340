import os
import socket
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from loraplex import processes
from loraplex_server.config import (
    AdapterConfig,
    ApiConfig,
    EngineConfig,
    ServeConfig,
)
from loraplex_server.control import ControlLine
from loraplex_server.messages import AdapterSpec

REPOSITORY = Path(__file__).parents[2]
CONFIG = ServeConfig(
    api=ApiConfig(model_id="m", api_key=("secret",), log_level="error"),
    engine=EngineConfig(
        adapters=AdapterConfig(sources=(AdapterSpec(adapter_id="a", path="/a", digest="d", rank=8, num_bytes=1),))
    ),
    link_address="/somewhere",
)
# A child that is busy and never looks at its line.
DEAF_CHILD = """
import sys, time
sys.path[:0] = {roots!r}
from loraplex import processes
processes.ORPHAN_GRACE_S = 0.0
processes._run = lambda name, config, control, rank: time.sleep(600)
sys.exit(processes.main(sys.argv[1:]))
"""


def write_config(folder: Path) -> Path:
    folder.mkdir()
    file = folder / "serve.json"
    file.write_bytes(msgspec.json.encode(CONFIG))
    return file


def test_a_child_gets_the_configuration_that_the_launcher_wrote(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, ServeConfig, int]] = []

    def run(name: str, config: ServeConfig, control: ControlLine, rank: int) -> int:
        seen.append((name, config, rank))
        control.close()
        return 5

    monkeypatch.setattr(processes, "_run", run)
    monkeypatch.setattr(processes.log, "set_up", lambda *args, **kwargs: None)
    monkeypatch.setattr(processes, "_end_without_launcher", lambda fd, folder: None)
    file = write_config(tmp_path / "link")
    ours, theirs = socket.socketpair()
    args = ["engine", "--rank", "3", "--config", str(file), "--control"]
    with ours:
        assert processes.main([*args, str(os.dup(theirs.fileno()))]) == 5
        theirs.close()
    assert seen == [("engine", CONFIG, 3)]
    assert file.exists()  # the launcher is there and clears up itself


def test_a_busy_child_ends_and_clears_up_when_the_launcher_is_gone(tmp_path: Path) -> None:
    file = write_config(tmp_path / "link")
    roots = [str(REPOSITORY / root) for root in ("launcher", "server")]
    ours, theirs = socket.socketpair()
    with theirs:
        fd = theirs.fileno()
        command = [sys.executable, "-c", DEAF_CHILD.format(roots=roots)]
        child = subprocess.Popen([*command, "engine", "--config", str(file), "--control", str(fd)], pass_fds=(fd,))
    ours.close()
    try:
        assert child.wait(30) == 1
    finally:
        child.kill()
        child.wait()
    assert not file.parent.exists()
