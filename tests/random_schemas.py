"""Random JSON schemas over all keywords that are enforced, small enough that most answers come to an end."""

import random
from typing import Any

NAMES = ("name", "id", "größe", "a b", 'q"uote', "<|im_end|>", "$ref", "properties", "0")
WORDS = ("red", "été", "a\nb", '"', "\\", "", "🙂", "</tool_call>", "true", "null")
PATTERNS = (r"^[a-z]{2,6}$", r"^\d{3}-\d{4}$", r"^(yes|no|maybe)$", r"^[A-Z][a-z]*( [A-Z][a-z]*){0,2}$", r"^x?y+z$")
FORMATS = ("date", "ipv4", "uuid", "email")

Schema = dict[str, Any]


def random_schema(seed: int) -> Schema:
    """The schema of a seed: an object, an array, or now and then anything else."""
    rng = random.Random(seed)
    make = rng.choice((_object, _object, _object, _array, _any))
    schema = make(rng, 3)
    if rng.random() < 0.2:
        leaf = _object(rng, 1)
        leaf["properties"]["next"] = {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}
        schema = {
            "$defs": {"node": leaf},
            "type": "object",
            "properties": {"head": {"$ref": "#/$defs/node"}, "rest": schema},
            "required": ["head"],
        }
    return schema


def _any(rng: random.Random, depth: int) -> Schema:
    leaves = (_string, _string, _integer, _number, _boolean, _null, _enum, _const)
    inner = (_object, _array, _tuple, _any_of, _all_of, _nullable)
    return rng.choice(leaves if depth <= 0 else leaves + inner)(rng, depth - 1)


def _object(rng: random.Random, depth: int) -> Schema:
    names = rng.sample(NAMES, rng.randint(0, 4))
    schema: Schema = {"type": "object", "properties": {name: _any(rng, depth - 1) for name in names}}
    required = [name for name in names if rng.random() < 0.6]
    if required or rng.random() < 0.5:
        schema["required"] = required
    kind = rng.random()
    if kind < 0.3:
        schema["additionalProperties"] = False
    elif kind < 0.4:
        schema["additionalProperties"] = _any(rng, 0)
    return schema


def _array(rng: random.Random, depth: int) -> Schema:
    least = rng.randint(0, 2)
    return {"type": "array", "items": _any(rng, depth - 1), "minItems": least, "maxItems": least + rng.randint(0, 2)}


def _tuple(rng: random.Random, depth: int) -> Schema:
    items = [_any(rng, depth - 1) for _ in range(rng.randint(1, 3))]
    return {"type": "array", "prefixItems": items, "items": False, "minItems": rng.randint(0, len(items))}


def _any_of(rng: random.Random, depth: int) -> Schema:
    return {"anyOf": [_any(rng, depth - 1) for _ in range(rng.randint(2, 3))]}


def _all_of(rng: random.Random, depth: int) -> Schema:
    low = rng.randint(-50, 50)
    return {"allOf": [{"type": "integer", "minimum": low}, {"maximum": low + rng.randint(0, 500)}]}


def _nullable(rng: random.Random, depth: int) -> Schema:
    return {"type": [rng.choice(("boolean", "integer")), "null"], "minimum": -1000, "maximum": 1000}


def _string(rng: random.Random, depth: int) -> Schema:
    kind = rng.random()
    if kind < 0.3:
        return {"type": "string", "pattern": rng.choice(PATTERNS)}
    if kind < 0.5:
        return {"type": "string", "format": rng.choice(FORMATS)}
    least = rng.randint(0, 4)
    return {"type": "string", "minLength": least, "maxLength": least + rng.randint(0, 8)}


def _integer(rng: random.Random, depth: int) -> Schema:
    low = rng.randint(-2000, 2000)
    schema: Schema = {"type": "integer", "minimum": low, "maximum": low + rng.choice((0, 1, 9, 1000, 10**9))}
    if rng.random() < 0.2:
        schema |= {"minimum": 0, "maximum": 1000, "multipleOf": rng.choice((2, 5, 12))}
    return schema


def _number(rng: random.Random, depth: int) -> Schema:
    low = rng.choice((-1.5, 0, 0.25, 100))
    key = rng.choice(("minimum", "exclusiveMinimum"))
    return {"type": "number", key: low, "maximum": low + rng.choice((1, 2.5, 1000))}


def _boolean(rng: random.Random, depth: int) -> Schema:
    return {"type": "boolean"}


def _null(rng: random.Random, depth: int) -> Schema:
    return {"type": "null"}


def _enum(rng: random.Random, depth: int) -> Schema:
    return {"enum": rng.sample([*WORDS, 0, -1.5, True, None, [], {"a": [1]}], rng.randint(1, 5))}


def _const(rng: random.Random, depth: int) -> Schema:
    return {"const": rng.choice([*WORDS, 7, False, None, ["x", {}]])}
