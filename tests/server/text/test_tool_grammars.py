"""What a grammar of calls lets a model write, the reader of the same format takes apart into those calls."""

import itertools
import json

import jsonschema
import pytest
from guided_walks import GrammarWalker

from loraplex_server.text.guides import choice_guide, schema_guide
from loraplex_server.text.tool_fields import read_tool_use
from loraplex_server.text.tool_formats import (
    HERMES,
    JSON,
    LLAMA3_JSON,
    MAX_CALLS,
    MISTRAL,
    MISTRAL_NAME_FIRST,
    ToolFormat,
    tools_guide,
)
from loraplex_server.text.tool_reader import ToolReader

FORMATS = [HERMES, LLAMA3_JSON, MISTRAL, MISTRAL_NAME_FIRST, JSON]
PLACE = {"type": "object", "properties": {"lat": {"type": "integer"}}, "additionalProperties": False}
SCHEMAS = {
    "weather": {
        "type": "object",
        "properties": {
            "city": {"type": "string", "maxLength": 5},
            "unit": {"enum": ["C", 'F"', "<tool_call>", "[TOOL_CALLS]", "}]; {"]},
            "place": {"$ref": "#/$defs/Place"},
        },
        "required": ["city", "unit"],
        "$defs": {"Place": PLACE},
        "additionalProperties": False,
    },
    "café::add": {"properties": {"a": {"type": "array", "items": {"type": "integer"}, "maxItems": 2}}},
    "now": None,
}
TOOLS = [{"type": "function", "function": {"name": name, "parameters": s}} for name, s in SCHEMAS.items()]


@pytest.fixture(scope="module", params=[False, True], ids=["spelt", "special"])
def walker(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> GrammarWalker:
    """Markers as plain text, and as special tokens."""
    special = ("<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]", "<|python_tag|>") if request.param else ()
    return GrammarWalker(tmp_path_factory.mktemp("walker"), special)


@pytest.mark.parametrize("tool_format", FORMATS, ids=lambda f: f.name + "-2" * f.name_first)
@pytest.mark.parametrize(("choice", "is_parallel"), [("required", True), ("required", False), ("weather", True)])
def test_calls_written_by_the_grammar_are_read_back_and_satisfy_their_schemas(
    walker: GrammarWalker, tool_format: ToolFormat, choice: str, is_parallel: bool
) -> None:
    use = read_tool_use(TOOLS, choice, is_parallel)
    assert use is not None
    guide = tools_guide(tool_format, use, walker.special_id)
    assert guide is not None
    assert (f"<[{walker.special_id(tool_format.marker)}]>" in guide.text) == (
        not tool_format.is_bare and walker.special_id(tool_format.marker) is not None
    )
    counts = set()
    for seed in range(6):
        text = walker.text(guide, seed)
        reader = ToolReader(tool_format, use.callable_names, is_parallel=use.is_parallel)
        outputs = [*map(reader.feed, text), reader.end()]
        assert "".join(said for said, _ in outputs) == ""
        calls: list[list[str]] = []
        for delta in itertools.chain.from_iterable(deltas for _, deltas in outputs):
            if delta.name is not None:
                calls.append([delta.name, ""])
            calls[-1][1] += delta.arguments
        counts.add(len(calls))
        for name, arguments in calls:
            assert name in SCHEMAS if choice == "required" else name == choice
            assert isinstance(json.loads(arguments), dict)
            jsonschema.validate(json.loads(arguments), SCHEMAS[name] or {"maxProperties": 0})
    assert max(counts) <= MAX_CALLS and min(counts) == 1
    assert (is_parallel and choice == "required") or counts == {1}


@pytest.mark.parametrize("tool_format", FORMATS, ids=lambda f: f.name + "-2" * f.name_first)
def test_with_the_schema_of_an_answer_a_text_is_that_or_calls(walker: GrammarWalker, tool_format: ToolFormat) -> None:
    use = read_tool_use(TOOLS, "auto", True)
    assert use is not None and tools_guide(tool_format, use, walker.special_id) is None
    schema = {"type": "object", "properties": {"size": {"type": "integer"}}, "required": ["size"]}
    guide = tools_guide(tool_format, use, walker.special_id, schema_guide("s", schema))
    assert guide is not None
    num_calls = []
    for seed in range(12):
        text = walker.text(guide, seed)
        reader = ToolReader(tool_format, use.callable_names)
        outputs = [*map(reader.feed, text), reader.end()]
        num_calls.append(reader.num_calls)
        if not reader.num_calls:
            assert "".join(said for said, _ in outputs) == text
            jsonschema.validate(json.loads(text), schema | {"additionalProperties": False})
    assert 0 in num_calls and max(num_calls) > 0


def test_only_strict_tools_enforce_what_cannot_be_enforced_fully(walker: GrammarWalker) -> None:
    function = {"name": "pick", "parameters": {"type": "object", "properties": {"a": {"uniqueItems": True}}}}

    def guide(**fields: bool):  # type: ignore[no-untyped-def]
        use = read_tool_use([{"type": "function", "function": function | fields}], "required", False)
        assert use is not None
        return tools_guide(HERMES, use, walker.special_id)

    assert "pick" in walker.text(guide(), 1)
    with pytest.raises(Exception, match="uniqueItems"):
        walker.text(guide(strict=True), 1)


def test_a_text_that_looks_like_a_special_token_is_spelt_out(walker: GrammarWalker) -> None:
    schema = {"properties": {"<tool_call>": {"const": "</tool_call>"}}, "required": ["<tool_call>"], "type": "object"}
    for guide in (schema_guide("s", schema, None), choice_guide("c", ['{"<tool_call>": "</tool_call>"}'])):
        assert json.loads(walker.text(guide, 1)) == {"<tool_call>": "</tool_call>"}
