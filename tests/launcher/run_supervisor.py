"""Run a supervisor over fake children: `python run_supervisor.py MARKS TIMEOUT GRACE RESTARTS NAME=BEHAVIOUR …`."""

import sys
from pathlib import Path

from loraplex import supervisor
from loraplex.console import Console
from loraplex.plan import LaunchPlan, ProcessSpec
from loraplex.supervisor import Supervisor
from loraplex_server import log
from loraplex_server.config import ApiConfig, ServeConfig

FAKE_CHILD = Path(__file__).with_name("fake_child.py")


def main() -> int:
    marks, timeout, grace, restarts, *children = sys.argv[1:]
    log.set_up("launcher")
    supervisor.STOP_GRACE_S = float(grace)
    supervisor.CAUSE_GRACE_S = 60.0  # children of a busy machine start as late as they like
    specs = []
    for child in children:
        name, behaviour = child.split("=")
        rank = None if name == "api" else len(specs) - 1
        argv = (sys.executable, str(FAKE_CHILD), behaviour, marks)
        specs.append(ProcessSpec(name, argv, {"FAKE_CHILD": "yes"}, rank=rank))
    config = ServeConfig(api=ApiConfig(hostname="127.0.0.1", port=3999, graceful_termination_timeout=int(timeout)))
    plan = LaunchPlan(config, tuple(specs), max_engine_restarts=int(restarts))
    return Supervisor(plan, Console(bars=False)).run()


if __name__ == "__main__":
    sys.exit(main())
