"""What each child of the supervisor runs: `python -m loraplex.processes api|engine --config FILE --control FD`.

An engine process may be given its `--rank` among those that share the model.
"""

import argparse
import os
import select
import shutil
import threading
import time
from pathlib import Path

import msgspec

from loraplex_server import log
from loraplex_server.config import ServeConfig
from loraplex_server.control import ControlLine

# A child that has lost its launcher has this long to end by itself.
ORPHAN_GRACE_S = 3.0


def _end_without_launcher(fd: int, folder: Path) -> None:
    """Wait for the launcher's end of the line to close, then see to it that this process ends, whatever it is doing."""
    hang_up = select.poll()
    hang_up.register(fd, 0)  # no event asked for: only the hang-up is reported, and nothing is read
    hang_up.poll()
    time.sleep(ORPHAN_GRACE_S)
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(1)


def _run(name: str, config: ServeConfig, control: ControlLine, rank: int) -> int:
    # Imported here: each process loads its own side only, and the API process must stay free of torch.
    if name == "api":
        from loraplex_server.api.process import run as run_api

        return run_api(config, control)
    from loraplex_server.engine.process import run as run_engine

    return run_engine(config, control, rank)


def main(args: list[str] | None = None) -> int:
    """Read the configuration, take over the control line and run one process until it ends."""
    parser = argparse.ArgumentParser(prog="loraplex.processes")
    parser.add_argument("name", choices=["api", "engine"])
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--control", type=int, required=True)
    parser.add_argument("--rank", type=int, default=0)
    options = parser.parse_args(args)
    config = msgspec.json.decode(options.config.read_bytes(), type=ServeConfig)
    folder = options.config.parent
    name = f"{options.name}-{options.rank}" if options.rank else options.name
    log.set_up(name, json_output=config.api.json_output, level=config.api.log_level)
    control = ControlLine.from_fd(options.control)
    threading.Thread(target=_end_without_launcher, args=(options.control, folder), daemon=True).start()
    try:
        return _run(options.name, config, control, options.rank)
    finally:
        if control.is_closed:  # the launcher is gone and cannot remove the folder
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    raise SystemExit(main())
