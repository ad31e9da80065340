"""Thoughts and text taken apart, however the pieces fall."""

import pytest

from loraplex_server.text.reasoning_reader import ReasoningReader


@pytest.mark.parametrize(
    ("text", "is_open", "thought", "said"),
    [
        ("<think>\nhm, so\n\n</think>\n\nParis.\n", False, "hm, so", "Paris.\n"),
        ("\n<think>hm</think>Paris", False, "hm", "Paris"),
        ("hm\n</think>\n\nParis", True, "hm", "Paris"),
        ("<think></think>Paris", False, "", "Paris"),
        ("\n\n</think>Paris", True, "", "Paris"),
        ("<think>a < b </ c </thin d</think>e", False, "a < b </ c </thin d", "e"),
        ("<think>cut </thi", False, "cut </thi", ""),
        ("<think>cut \n", False, "cut", ""),
        ("Paris is <think>no thought</think>", False, "", "Paris is <think>no thought</think>"),
        (" Paris", False, "", " Paris"),
        ("<thin", False, "", "<thin"),
        (" \n", False, "", " \n"),
        ("<think>a</think>b</think>c", False, "a", "b</think>c"),
        ("", False, "", ""),
        ("", True, "", ""),
    ],
)
@pytest.mark.parametrize("size", [1, 2, 3, 7, 100])
def test_every_cut_of_an_answer_reads_the_same(text: str, is_open: bool, thought: str, said: str, size: int) -> None:
    reader = ReasoningReader(is_open=is_open)
    outputs = [*(reader.feed(text[at : at + size]) for at in range(0, len(text), size)), reader.end()]
    assert "".join(one for one, _ in outputs) == thought
    assert "".join(one for _, one in outputs) == said


def test_thoughts_and_text_come_as_they_are_written() -> None:
    reader = ReasoningReader(is_open=False)
    assert [reader.feed(piece) for piece in ("<think>", "so ", "it is", " ", "</think>", "\n", "Pa", "ris")] == [
        ("", ""), ("so", ""), (" it is", ""), ("", ""), ("", ""), ("", ""), ("", "Pa"), ("", "ris"),
    ]  # fmt: skip
