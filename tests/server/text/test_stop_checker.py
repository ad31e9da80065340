import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loraplex_server.text.detokenizer import StopChecker


def kept_text(stop: list[str], deltas: list[str]) -> tuple[str, bool]:
    """The text up to the first stop, and whether there was one."""
    checker = StopChecker(stop)
    text = ""
    for delta in deltas:
        keep = checker.feed(delta)
        if keep is not None:
            return text + delta[:keep], True
        text += delta
    return text, False


def first_stop(stop: list[str], text: str) -> tuple[str, bool]:
    ends = [text.index(item) + len(item) for item in stop if item in text]
    return (text[: min(ends)], True) if ends else (text, False)


@settings(deadline=None)
@given(
    stop=st.lists(st.text("abA ", min_size=1, max_size=4), max_size=4),
    deltas=st.lists(st.text("abA ", max_size=6), max_size=12),
)
def test_the_first_stop_to_end_is_found_however_the_text_is_cut(stop: list[str], deltas: list[str]) -> None:
    assert kept_text(stop, deltas) == first_stop(stop, "".join(deltas))


@pytest.mark.parametrize(
    ("stop", "deltas", "expected"),
    [
        (["END"], ["xE", "N", "D and more"], "xEND"),
        (["."], ["One. Two."], "One."),
        (["\n\n"], ["a\n", "\nb"], "a\n\n"),
        (["abc", "b"], ["abc"], "ab"),
        (["aab"], ["aa", "ab"], "aaab"),
        (["👨‍👩"], ["👨", "\u200d", "👩", "x"], "👨‍👩"),
        (["Hi"], ["Hi"], "Hi"),
    ],
)
def test_the_stop_is_kept_and_nothing_after_it(stop: list[str], deltas: list[str], expected: str) -> None:
    assert kept_text(stop, deltas) == (expected, True)


def test_a_stop_longer_than_three_hundred_characters_is_found() -> None:
    stop = "x" * 400 + "y"
    assert kept_text([stop], ["a", *("x" * 401), "y"]) == ("a" + "x" * 401 + "y", True)


def test_without_stop_strings_nothing_stops() -> None:
    assert kept_text([], ["a", "b"]) == ("ab", False)


def test_no_more_text_is_held_than_a_stop_string_needs() -> None:
    checker = StopChecker(["abcd"])
    for _ in range(1000):
        assert checker.feed("some longer piece of text ") is None
    assert len(checker._tail) == 3
