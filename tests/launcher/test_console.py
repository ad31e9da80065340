import logging

import pytest

from loraplex.console import Console


def test_without_a_terminal_a_phase_is_told_in_quarters(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "loraplex")
    with Console(bars=False) as console:
        for done in range(0, 101):
            console.progress("loading weights", done, 100)
    assert [record.getMessage() for record in caplog.records] == [
        f"loading weights: {share}%" for share in (0, 25, 50, 75, 100)
    ]


def test_a_new_phase_begins_anew(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "loraplex")
    with Console(bars=False) as console:
        console.progress("one", 100, 100)
        console.progress("two", 0, 100)
    assert [record.getMessage() for record in caplog.records] == ["one: 100%", "two: 0%"]


def test_an_error_is_one_line_whatever_its_cause_says(caplog: pytest.LogCaptureFixture) -> None:
    with Console(bars=False) as console:
        console.error("first\nsecond")
    assert caplog.records[0].getMessage() == "first second"


def test_a_bar_is_drawn_on_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with Console(bars=True) as console:
        console.progress("loading weights", 50, 100)
        console.line("a line beside the bar")
        console.progress("loading weights", 100, 100)
    assert "loading weights" in capsys.readouterr().err
