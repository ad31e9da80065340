"""A child of the supervisor that behaves as its first argument says; speaks the control line, knows no model.

`python fake_child.py BEHAVIOUR MARKS --config FILE --control FD`: what happens to it, it writes into the folder MARKS.
"""

import argparse
import os
import signal
import sys
import time
from pathlib import Path

from loraplex_server.control import ControlLine


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("behaviour")
    parser.add_argument("marks", type=Path)
    parser.add_argument("--config", type=Path)
    parser.add_argument("--control", type=int)
    options = parser.parse_args()
    control = ControlLine.from_fd(options.control)
    name = f"{options.behaviour}-{os.getpid()}"

    def mark(event: str) -> None:
        (options.marks / f"{event}-{options.behaviour}").touch()

    (options.marks / f"pid-{name}").write_text(str(os.getpid()))
    match options.behaviour:
        case "fail":
            control.send("failed", error="no such model 'x': check --model-id")
            return 1
        case "lose_ranks":
            control.send("ranks_lost")
            return 1
        case "crash":
            return 7
        case "load_forever":
            control.send("progress", phase="loading weights", done=1, total=4)
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            time.sleep(600)
    stopping: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: stopping.append(number))
    control.send("ready", report=[f"{options.behaviour} reports"])
    mark("ready")
    if options.behaviour == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    deaf = options.behaviour == "hang"
    while not control.is_closed:
        for event in [] if deaf else control.receive():
            mark(event["event"])
            if event["event"] == "ping":
                control.send("pong", **({"at_work_s": 31.0} if options.behaviour == "busy" else {}))
        if stopping:
            mark("sigterm")
            if options.behaviour == "slow_drain":
                time.sleep(0.5)
                mark("drained")
                return 0
            if options.behaviour != "never_drain":
                return 0
        if options.behaviour == "die_when_told" and (options.marks / "die").exists():
            return 3
        time.sleep(0.01)
    mark("orphaned")
    return 0


if __name__ == "__main__":
    sys.exit(main())
