"""Bodies made up from the OpenAPI document's own schemas: no 5xx, and only answers that the document describes.

The short form of tests/clients/openapi_cases.py, which gives schemathesis thousands of requests.
"""

import functools
import json
import random
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from scripted_engine import TestServer, with_server

from loraplex_server.api.openapi import openapi_document

NUM_CASES = 150


def with_definitions(value: Any) -> Any:
    """A schema of the document on its own feet: references lead to $defs."""
    text = json.dumps(value).replace("#/components/schemas/", "#/$defs/")
    return json.loads(text)


DOCUMENT = openapi_document()
DEFINITIONS = with_definitions(DOCUMENT["components"]["schemas"])
OPERATIONS = {path: operations["post"] for path, operations in DOCUMENT["paths"].items() if "post" in operations}
WITH_BODY = sorted(path for path, operation in OPERATIONS.items() if "requestBody" in operation)


@functools.cache
def validator_of(path: str, status: int) -> Draft202012Validator:
    schema = OPERATIONS[path]["responses"][str(status)]["content"]["application/json"]["schema"]
    return Draft202012Validator(with_definitions(schema) | {"$defs": DEFINITIONS})


def check(path: str, body: Any, status: int, media_type: str, text: str) -> None:
    described = OPERATIONS[path]["responses"]
    assert status < 500 and str(status) in described, (path, body, status, text)
    content = described[str(status)]["content"]
    assert media_type.partition(";")[0] in content, (path, body, media_type)
    if media_type == "application/json":
        validator_of(path, status).validate(json.loads(text))


def made_up(schema: dict[str, Any], choose: random.Random) -> Any:
    """A value that a schema of ours allows, more or less: bounds are sometimes ignored, so that refusals come too."""
    if "$ref" in schema:
        return made_up(DEFINITIONS[schema["$ref"].rpartition("/")[2]], choose)
    if "anyOf" in schema:
        return made_up(choose.choice(schema["anyOf"]), choose)
    match schema.get("type"):
        case "object":
            properties = schema.get("properties", {})
            given = [name for name in properties if name in schema.get("required", ()) or choose.random() < 0.15]
            return {name: made_up(properties[name], choose) for name in given}
        case "array":
            return [made_up(schema.get("items", {}), choose) for _ in range(choose.choice((0, 1, 1, 2)))]
        case "string":
            return choose.choice(
                ("", "a", "pirate", "json", "tiny-base", "user", "text", "\u00e9\U0001f600\x00", "x" * 50)
            )
        case "integer":
            return choose.choice((0, 1, 2, 3, 5, 97, -1, 2**31, 2**64))
        case "number":
            return choose.choice((0, 0.5, 1, 1.0, -0.0, 2, 1e-7, 1e30, -3.5))
        case "boolean":
            return choose.random() < 0.5
        case "null":
            return None
        case _:
            return choose.choice((None, 1, "a", [], {}, {"type": "json_object"}, [1], {"a": {"b": [None]}}))


@pytest.mark.parametrize("path", WITH_BODY)
def test_an_answer_to_a_made_up_body_is_one_that_the_document_describes(path: str) -> None:
    schema = with_definitions(OPERATIONS[path]["requestBody"]["content"]["application/json"]["schema"])

    async def test(server: TestServer) -> None:
        choose = random.Random(path)
        for _ in range(NUM_CASES):
            body = made_up(schema, choose)
            content = json.dumps(body)
            answer = await server.http.post(path, content=content, headers={"content-type": "application/json"})
            check(path, body, answer.status_code, answer.headers["content-type"], answer.text)
        await server.until_idle()

    with_server(test)
