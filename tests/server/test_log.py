import json
import logging
from collections.abc import Iterator

import pytest

from loraplex_server import log


@pytest.fixture(autouse=True)
def restored_logging() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


def test_a_text_line_names_process_and_request(capsys: pytest.CaptureFixture[str]) -> None:
    log.set_up("engine-0")
    token = log.request_id.set("r1")
    logging.getLogger("x").info("one %s", "message")
    log.request_id.reset(token)
    line = capsys.readouterr().err
    assert line.endswith("INFO    engine-0 [r1]: one message\n")


def test_a_json_line_is_one_object_tracebacks_included(capsys: pytest.CaptureFixture[str]) -> None:
    log.set_up("api", json_output=True)
    try:
        raise ValueError("broken")
    except ValueError:
        logging.getLogger("x").exception("it failed")
    (line,) = capsys.readouterr().err.splitlines()
    entry = json.loads(line)
    assert (entry["level"], entry["process"], entry["fields"]["message"]) == ("ERROR", "api", "it failed")
    assert "ValueError: broken" in entry["exception"]
    assert "request_id" not in entry


@pytest.mark.parametrize(
    ("text", "level"),
    [
        ("info", logging.INFO),
        ("WARN", logging.WARNING),
        ("debug", logging.DEBUG),
        ("text_generation=debug,error", logging.ERROR),
        ("nonsense", logging.INFO),
    ],
)
def test_a_level_may_come_with_filters_of_modules(text: str, level: int) -> None:
    assert log.parse_level(text) == level


def test_lines_below_the_level_are_not_written(capsys: pytest.CaptureFixture[str]) -> None:
    log.set_up("api", level="warn")
    logging.getLogger("x").info("unseen")
    assert capsys.readouterr().err == ""
