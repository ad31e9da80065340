"""The stop string is cut from a text that was partly sent before it was found."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraplex_server.text.detokenizer import StopChecker
from loraplex_server.text.stop_text import StopTextFilter


def shown(pieces: list[str], stop: list[str]) -> tuple[str, bool]:
    """What a choice shows of pieces that end where the stop checker ends them."""
    checker, text_filter = StopChecker(stop), StopTextFilter(stop)
    out = ""
    for piece in pieces:
        kept = checker.feed(piece)
        out += text_filter.feed(piece if kept is None else piece[:kept])
        if kept is not None:
            break
    rest, was_stopped = text_filter.end()
    return out + rest, was_stopped


@given(
    pieces=st.lists(st.text("abc", max_size=4), max_size=12),
    stop=st.lists(st.text("abc", min_size=1, max_size=4), max_size=3),
)
def test_the_text_ends_where_the_first_complete_stop_string_begins(pieces: list[str], stop: list[str]) -> None:
    text = "".join(pieces)
    ends = [text.find(one) + len(one) for one in stop if one in text]
    if not ends:
        assert shown(pieces, stop) == (text, False)
        return
    end = min(ends)
    longest = max(len(one) for one in stop if text[:end].endswith(one))
    assert shown(pieces, stop) == (text[: end - longest], True)


@pytest.mark.parametrize(("piece", "now"), [("hello", "hello"), ("helloST", "hello"), ("STO", ""), ("STx", "STx")])
def test_only_what_may_be_a_stop_string_waits(piece: str, now: str) -> None:
    assert StopTextFilter(["STOP", "\n\n"]).feed(piece) == now
