import select
import socket
import time
from collections.abc import Iterator
from typing import Any

import pytest

from loraplex_server.control import ControlLine
from loraplex_server.engine.heartbeat import Heartbeat

DEADLINE_S = 30


@pytest.fixture
def ends() -> Iterator[tuple[Heartbeat, ControlLine]]:
    """An engine's heartbeat, and the supervisor's end of its line."""
    ours, theirs = socket.socketpair()
    heartbeat, supervisor = Heartbeat(ControlLine(ours)), ControlLine(theirs)
    yield heartbeat, supervisor
    heartbeat.close()
    supervisor.close()
    ours.close()


def said(line: ControlLine) -> dict[str, Any]:
    """The next thing that the engine says."""
    deadline = time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline:
        if events := line.receive():
            return events[0]
        time.sleep(0.005)
    raise AssertionError("the engine says nothing")


def test_a_ping_is_answered_while_a_step_runs_and_says_for_how_long(ends: tuple[Heartbeat, ControlLine]) -> None:
    heartbeat, supervisor = ends
    supervisor.send("ping")
    assert said(supervisor) == {"event": "pong", "at_work_s": 0.0}
    with heartbeat.at_work():
        time.sleep(0.02)  # a step that holds the main thread
        supervisor.send("ping")
        first = said(supervisor)["at_work_s"]
        supervisor.send("ping")
        assert said(supervisor)["at_work_s"] > first >= 0.02
    supervisor.send("ping")
    assert said(supervisor)["at_work_s"] == 0.0


@pytest.mark.parametrize("hangs_up", [False, True])
def test_a_stop_or_a_hang_up_wakes_who_waits(ends: tuple[Heartbeat, ControlLine], hangs_up: bool) -> None:
    heartbeat, supervisor = ends
    assert select.select([heartbeat], (), (), 0) == ([], [], [])
    supervisor.send("stop")
    if hangs_up:
        supervisor.close()
    assert select.select([heartbeat], (), (), DEADLINE_S)[0] == [heartbeat]
    assert heartbeat.is_over
    deadline = time.monotonic() + DEADLINE_S
    while heartbeat.lost_supervisor != hangs_up:
        assert time.monotonic() < deadline


def test_words_of_both_threads_stay_whole(ends: tuple[Heartbeat, ControlLine]) -> None:
    heartbeat, supervisor = ends
    count = 30  # what a socket holds when nobody reads
    for number in range(count):
        supervisor.send("ping")
        heartbeat.send("progress", done=number)
    events: list[dict[str, Any]] = []
    deadline = time.monotonic() + DEADLINE_S
    while len(events) < 2 * count and time.monotonic() < deadline:
        events += supervisor.receive()
    assert [event["done"] for event in events if event["event"] == "progress"] == list(range(count))
    assert sum(event["event"] == "pong" for event in events) == count
