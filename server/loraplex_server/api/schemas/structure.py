"""The ways in which clients ask for structured output, all of them read into one kind of guide."""

from collections.abc import Mapping
from typing import Any

from loraplex_server.errors import InvalidRequest
from loraplex_server.text.guides import (
    JSON_WHITESPACE,
    Guide,
    choice_guide,
    grammar_guide,
    object_guide,
    regex_guide,
    schema_guide,
)

# Spellings of the type in TGI's `grammar`, LoRAX's and OpenAI's `response_format`.
_KINDS = {
    "text": "text",
    "json": "json",
    "json_object": "json",
    "jsonobject": "json",
    "json_schema": "json_schema",
    "jsonschema": "json_schema",
    "regex": "regex",
}
_SOURCES = ("json", "regex", "choice", "grammar", "json_object")


def format_guide(field: str, given: Mapping[str, Any] | None) -> Guide | None:
    """The guide of TGI's `grammar` or of any dialect's `response_format`; None for free text. Raises InvalidRequest.

    A schema stands in `value` (TGI), in `schema` (LoRAX) or in `json_schema.schema` (OpenAI). Without one the answer
    is any JSON object, and with LoRAX's `schema: null` it is free.
    """
    if given is None:
        return None
    name = given.get("type")
    match _KINDS.get(name.lower()) if isinstance(name, str) else None:
        case "text":
            return None
        case "regex":
            return regex_guide(f"{field}.value", given.get("value"))
        case "json":
            return _schema_in(field, given, ("value", "schema"))
        case "json_schema":
            for key in ("json_schema", "value"):
                if isinstance(given.get(key), dict):
                    return _schema_in(f"{field}.{key}", given[key], ("schema",))
            if "schema" in given:
                return _schema_in(field, given, ("schema",))
            raise InvalidRequest(f"`{field}` of type json_schema must have `json_schema`, an object with the schema")
    kinds = "text, json_object, json_schema, json, regex"
    raise InvalidRequest(f"`{field}.type` must be one of {kinds}. Given: {str(name)[:40]!r}")


def _schema_in(field: str, given: Mapping[str, Any], keys: tuple[str, ...]) -> Guide | None:
    for key in keys:
        if key in given:
            schema = given[key]
            if schema is None and key == "schema":
                return None
            return schema_guide(f"{field}.{key}", schema)
    return object_guide()


def older_vllm_guides(by_source: Mapping[str, Any], whitespace_pattern: str | None) -> list[Guide | None]:
    """The guides of vLLM's older fields, `guided_json` … by their sources json, regex, choice and grammar.

    Raises InvalidRequest.
    """
    return [
        structured_guide(f"guided_{source}", {source: value, "whitespace_pattern": whitespace_pattern}, source)
        for source, value in by_source.items()
        if value is not None
    ]


def structured_guide(field: str, given: Mapping[str, Any] | None, only: str | None = None) -> Guide | None:
    """The guide of an object in the shape of vLLM's StructuredOutputsParams, None for none. Raises InvalidRequest.

    `only` names the one source that is looked at, where `field` is that source's own.
    """
    if given is None:
        return None
    if given.get("structural_tag") is not None:
        raise InvalidRequest(f"`{field}.structural_tag` is not supported; use `grammar` or `tools`")
    sources = [kind for kind in _SOURCES if given.get(kind) not in (None, False)]
    if len(sources) != 1:
        raise InvalidRequest(f"`{field}` must have exactly one of {', '.join(_SOURCES)}. Given: {len(sources)}")
    kind = sources[0]
    name = field if only else f"{field}.{kind}"
    match kind:
        case "json":
            return schema_guide(name, given[kind], _whitespace(field, given))
        case "regex":
            return regex_guide(name, given[kind])
        case "choice":
            return choice_guide(name, given[kind])
        case "grammar":
            return grammar_guide(name, given[kind])
        case _:
            return object_guide()


def _whitespace(field: str, given: Mapping[str, Any]) -> str | None:
    pattern = given.get("whitespace_pattern")
    if pattern is not None and not isinstance(pattern, str):
        raise InvalidRequest(f"`{field}.whitespace_pattern` must be a regular expression")
    return None if given.get("disable_any_whitespace") else pattern or JSON_WHITESPACE


def only_one(fields: str, guides: list[Guide | None]) -> Guide | None:
    """The one guide among what several fields asked for. Raises InvalidRequest for more."""
    asked = [guide for guide in guides if guide is not None]
    if len(asked) > 1:
        raise InvalidRequest(f"only one of {fields} may ask for a form of the answer. Given: {len(asked)}")
    return asked[0] if asked else None
