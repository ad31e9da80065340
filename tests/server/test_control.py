import select
import socket
import threading
from collections.abc import Iterator

import pytest

from loraplex_server.control import ControlLine


@pytest.fixture
def ends() -> Iterator[tuple[ControlLine, socket.socket]]:
    """A line, and the bare socket at its other end."""
    ours, theirs = socket.socketpair()
    line = ControlLine(ours)
    yield line, theirs
    line.close()
    theirs.close()


def test_what_is_said_arrives_with_its_fields() -> None:
    first, second = map(ControlLine, socket.socketpair())
    first.send("progress", phase="loading", done=1, total=2)
    first.send("ready", report=["Ærø", "two\nlines"])
    assert second.receive() == [
        {"event": "progress", "phase": "loading", "done": 1, "total": 2},
        {"event": "ready", "report": ["Ærø", "two\nlines"]},
    ]
    assert second.receive() == [] and not second.is_closed
    first.close()
    second.close()


def test_half_a_line_waits_for_its_other_half(ends: tuple[ControlLine, socket.socket]) -> None:
    line, other = ends
    other.sendall(b'{"event": "pi')
    assert line.receive() == []
    other.sendall(b'ng"}\n{"event"')
    assert line.receive() == [{"event": "ping"}]
    other.sendall(b': "stop"}\n')
    assert line.receive() == [{"event": "stop"}]


def test_the_last_words_are_heard_when_the_other_side_is_gone(ends: tuple[ControlLine, socket.socket]) -> None:
    line, other = ends
    other.sendall(b'{"event": "failed", "error": "no such model"}\n')
    other.close()
    assert line.receive() == [{"event": "failed", "error": "no such model"}]
    assert line.is_closed
    assert line.receive() == []


def test_speaking_to_nobody_is_no_error(ends: tuple[ControlLine, socket.socket]) -> None:
    line, other = ends
    other.close()
    line.send("ready")
    assert line.is_closed
    line.send("ready")


def test_a_message_larger_than_the_sockets_buffer_arrives_whole() -> None:
    first, second = map(ControlLine, socket.socketpair())
    sender = threading.Thread(target=first.send, args=("failed",), kwargs={"error": "x" * 3_000_000})
    sender.start()
    events: list[dict[str, str]] = []
    while not events:
        select.select((second,), (), ())
        events = second.receive()
    sender.join()
    assert len(events[0]["error"]) == 3_000_000
    first.close()
    second.close()


def test_a_line_can_be_taken_over_by_its_descriptor() -> None:
    ours, theirs = socket.socketpair()
    line = ControlLine.from_fd(theirs.detach())
    ours.sendall(b'{"event": "ping"}\n')
    assert line.receive() == [{"event": "ping"}]
    ours.close()
    line.close()
