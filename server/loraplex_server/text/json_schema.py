"""JSON schemas as they are meant for generation: objects that name their properties have no others."""

import json
from collections.abc import Iterator
from typing import Any

# Keywords that describe the value itself; where two of them stand side by side the value must satisfy both.
_APPLICATORS = ("properties", "allOf", "anyOf", "oneOf", "$ref", "$dynamicRef", "not", "if", "dependentSchemas")
_SAYS_WHAT_ELSE = ("additionalProperties", "patternProperties", "unevaluatedProperties", "propertyNames")
_MAPS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_PLAIN = ("enum", "const", "default", "examples", "required", "x-guidance")


class SchemaError(ValueError):
    """No text can be held to the schema; the message goes on from its name."""


def schema_text(text: str, whitespace: str | None) -> str:
    """The JSON of a schema as `laid_out` makes it. Raises SchemaError."""
    try:
        schema = json.loads(text)
        if schema is False:
            raise SchemaError("is false, which nothing satisfies")
        return json.dumps(laid_out(schema, whitespace))
    except RecursionError:
        raise SchemaError("is nested too deeply") from None


def laid_out(schema: Any, whitespace: str | None) -> dict[str, Any]:
    """The schema as llguidance takes it, closed, with white space of a pattern or like a model's own: `, ` and `: `."""
    options: dict[str, Any] = {"whitespace_flexible": whitespace is not None}
    if whitespace is None:
        # As Python's json writes it, and as most models do.
        options |= {"item_separator": ", ", "key_separator": ": "}
    else:
        options["whitespace_pattern"] = whitespace
    return ({} if schema is True else closed(schema)) | {"x-guidance": options}


def closed(schema: Any) -> Any:
    """The schema with `additionalProperties: false` where an object names its properties and nothing is said of others.

    What it allows is always allowed by the schema as it was given. A schema is left as it is when it combines
    descriptions of one object (`allOf` of several, `properties` beside `anyOf` …): there each may need what the
    others leave open.
    """
    return schema if _combines(schema) else _closed(schema)


def _closed(schema: Any) -> Any:
    if isinstance(schema, list):
        return [_closed(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    result: dict[str, Any] = {}
    for key, value in schema.items():
        if key in _PLAIN:
            result[key] = value
        elif key in _MAPS and isinstance(value, dict):
            result[key] = {name: _closed(one) for name, one in value.items()}
        else:
            result[key] = _closed(value)
    return result | {"additionalProperties": False} if _can_be_closed(schema) else result


def _can_be_closed(schema: dict[str, Any]) -> bool:
    properties, required = schema.get("properties"), schema.get("required", [])
    if not isinstance(properties, dict) or not isinstance(required, list):
        return False
    names_all = all(name in properties for name in required)
    return names_all and "minProperties" not in schema and not any(key in schema for key in _SAYS_WHAT_ELSE)


def _combines(schema: Any) -> bool:
    if isinstance(schema, list):
        return any(_combines(one) for one in schema)
    if not isinstance(schema, dict):
        return False
    several = schema.get("allOf")
    if sum(key in schema for key in _APPLICATORS) > 1 or (isinstance(several, list) and len(several) > 1):
        return True
    return any(_combines(one) for one in _parts(schema))


def _parts(schema: dict[str, Any]) -> Iterator[Any]:
    """The schemas directly inside a schema."""
    for key, value in schema.items():
        if key in _PLAIN:
            continue
        if key in _MAPS and isinstance(value, dict):
            yield from value.values()
        else:
            yield value
