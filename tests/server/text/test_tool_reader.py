"""Calls of tools in the formats of model families: whole, in pieces, and what is no call after all."""

import json
import random

import pytest

from loraplex_server.text.tool_formats import (
    HERMES,
    JSON,
    LLAMA3_JSON,
    MISTRAL,
    MISTRAL_NAME_FIRST,
    ToolFormat,
    find_format,
)
from loraplex_server.text.tool_reader import ToolReader

NAMES = ("weather", "add")
A = {"city": 'Paris, {"x"} <tool_call>', "days": [1, {"n": None}]}
A_TEXT = json.dumps(A)
Calls = list[tuple[str, str]]


def read(tool_format: ToolFormat, pieces: list[str], **options: bool) -> tuple[str, Calls]:
    """The text and the calls of an answer; every delta is checked to be in order."""
    reader = ToolReader(tool_format, NAMES, **options)
    text = ""
    calls: list[list[str]] = []
    for said, deltas in [*map(reader.feed, pieces), reader.end()]:
        text += said
        for delta in deltas:
            if delta.name is not None:
                assert delta.index == len(calls) and delta.arguments == ""
                calls.append([delta.name, ""])
            else:
                assert delta.index == len(calls) - 1 and delta.arguments
                calls[-1][1] += delta.arguments
    assert reader.num_calls == len(calls)
    return text, [(name, arguments) for name, arguments in calls]


ONE = [("weather", A_TEXT)]
TWO = [("weather", A_TEXT), ("add", '{"a": 1}')]
ANSWERS = [
    (HERMES, f'<tool_call>\n{{"name": "weather", "arguments": {A_TEXT}}}\n</tool_call>', "", ONE),
    (HERMES, f'<tool_call>{{"arguments": {A_TEXT}, "name": "weather"}}</tool_call>', "", ONE),
    (HERMES, f'\n\n<tool_call>\n{{"name": "weather", "arguments": {A_TEXT}}}', "", ONE),
    (HERMES, f'<tool_call>\n{{"name": "weather", "arguments": {A_TEXT}}}\n</tool_call>\n'
             '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>\n', "", TWO),
    (HERMES, f'I look.\n<tool_call>\n{{"name": "weather", "arguments": {A_TEXT}}}\n</tool_call>\nDone, {{so}}!',
     "I look.\nDone, {so}!", ONE),
    (HERMES, '<tool_call>\n{"name": "odd", "arguments": null}\n</tool_call>', "", [("odd", "{}")]),
    (HERMES, '<tool_call>\n{"name": "add"}\n</tool_call>', "", [("add", "{}")]),
    (HERMES, f'<tool_call>\n{{"name": "weather", "arguments": {json.dumps(A_TEXT)}}}\n</tool_call>', "", ONE),
    (HERMES, '{"name": "weather", "arguments": {}}', '{"name": "weather", "arguments": {}}', []),
    (HERMES, "no call < here <tool> a", "no call < here <tool> a", []),
    (HERMES, "<tool_call>\nnot JSON", "<tool_call>\nnot JSON", []),
    (HERMES, '<tool_call>\n{"nome": "x"}\n</tool_call>', '<tool_call>\n{"nome": "x"}\n</tool_call>', []),
    (HERMES, " \n", " \n", []),
    (HERMES, " text", " text", []),
    (LLAMA3_JSON, f'{{"name": "weather", "parameters": {A_TEXT}}}', "", ONE),
    (LLAMA3_JSON, f'<|python_tag|>{{"name": "weather", "parameters": {A_TEXT}}}', "", ONE),
    (LLAMA3_JSON, f'{{"type": "function", "name": "weather", "parameters": {A_TEXT}}}; '
                  '{"name": "add", "parameters": {"a": 1}}', "", TWO),
    (LLAMA3_JSON, f'{{"function": "weather", "parameters": {A_TEXT}}}', "", ONE),
    (LLAMA3_JSON, '{"name": "Anne", "age": 20}', '{"name": "Anne", "age": 20}', []),
    (LLAMA3_JSON, '[1, 2]', "[1, 2]", []),
    (LLAMA3_JSON, 'The call is {"name": "weather", "parameters": {}}',
     'The call is {"name": "weather", "parameters": {}}', []),
    (MISTRAL, f'[TOOL_CALLS] [{{"name": "weather", "arguments": {A_TEXT}}}, {{"name": "add", "arguments": '
              '{"a": 1}}]', "", TWO),
    (MISTRAL, f'[TOOL_CALLS][{{"name": "weather", "arguments": {A_TEXT}, "id": "VvvODy9mT"}}]', "", ONE),
    (MISTRAL, "Text [TOOL] only", "Text [TOOL] only", []),
    (MISTRAL_NAME_FIRST, f'[TOOL_CALLS]weather[ARGS]{A_TEXT}[TOOL_CALLS]add[CALL_ID]k3[ARGS]{{"a": 1}}', "", TWO),
    (MISTRAL_NAME_FIRST, f"[TOOL_CALLS]weather{A_TEXT}", "", ONE),
    (MISTRAL_NAME_FIRST, "[TOOL_CALLS]no call at all", "[TOOL_CALLS]no call at all", []),
    (JSON, f'{{"name": "weather", "arguments": {A_TEXT}}}', "", ONE),
    (JSON, f'[{{"name": "weather", "arguments": {A_TEXT}}}, {{"name": "add", "parameters": {{"a": 1}}}}]', "", TWO),
    (JSON, f'{{"type": "function", "function": {{"name": "weather", "arguments": {A_TEXT}}}}}', "", ONE),
    (JSON, f'<tool_call>{{"name": "weather", "arguments": {A_TEXT}}}</tool_call>', "", ONE),
    (JSON, '{"name": "weather", "arguments": {"a"', "", [("weather", '{"a"')]),  # cut by a limit
    (JSON, '{"na', '{"na', []),
    (JSON, "", "", []),
]  # fmt: skip


@pytest.mark.parametrize(("tool_format", "answer", "text", "calls"), ANSWERS)
def test_an_answer_is_taken_apart_the_same_way_however_it_is_cut(
    tool_format: ToolFormat, answer: str, text: str, calls: Calls
) -> None:
    rng = random.Random(answer)
    cuts = [[answer], list(answer)]
    for _ in range(20):
        places = sorted(rng.sample(range(1, max(len(answer), 2)), min(6, max(len(answer) - 1, 1))))
        cuts.append([answer[a:b] for a, b in zip([0, *places], [*places, len(answer)], strict=True)])
    for pieces in cuts:
        assert read(tool_format, pieces) == (text, calls), pieces


def test_without_parallel_calls_only_the_first_counts() -> None:
    answer = ANSWERS[3][1] + "and more"
    assert read(HERMES, [answer], is_parallel=False) == ("", ONE)
    assert read(HERMES, list(answer), is_parallel=False) == ("", ONE)


def test_arguments_are_passed_on_as_they_come_but_not_before_the_name() -> None:
    reader = ToolReader(HERMES, NAMES)
    assert reader.feed('<tool_call>\n{"name": "wea') == ("", [])
    assert [(d.name, d.arguments) for d in reader.feed('ther", "arguments": {"ci')[1]] == [
        ("weather", ""),
        (None, '{"ci'),
    ]
    assert [d.arguments for d in reader.feed('ty": "x"')[1]] == ['ty": "x"']
    late = ToolReader(HERMES, NAMES)
    assert late.feed('<tool_call>{"arguments": {"a": 1}, ') == ("", [])
    assert [(d.name, d.arguments) for d in late.feed('"name": "add"')[1]] == [("add", ""), (None, '{"a": 1}')]


def test_text_comes_out_as_soon_as_it_can_be_no_marker() -> None:
    reader = ToolReader(HERMES, NAMES)
    assert reader.feed("Hello <to") == ("Hello ", [])
    assert reader.feed("y>") == ("<toy>", [])


@pytest.mark.parametrize(
    ("name", "source", "found"),
    [
        ("auto", "{{ '<tool_call>' }}", HERMES),
        ("auto", "{{ '[TOOL_CALLS]' }}", MISTRAL),
        ("auto", "{{ '[TOOL_CALLS]' ~ name ~ '[ARGS]' }}", MISTRAL_NAME_FIRST),
        ("auto", "Environment: ipython", LLAMA3_JSON),
        ("auto", "{{ messages }}", JSON),
        ("hermes", "[TOOL_CALLS]", HERMES),
        ("llama3_json", "", LLAMA3_JSON),
        ("mistral", "[ARGS]", MISTRAL_NAME_FIRST),
        ("json", "<tool_call>", JSON),
    ],
)
def test_the_format_is_the_one_named_or_the_one_of_the_template(name: str, source: str, found: ToolFormat) -> None:
    assert find_format(name, source) is found
