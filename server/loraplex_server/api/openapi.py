"""The OpenAPI document, from the schemas that the routes use."""

import functools
from typing import Any

import msgspec
from pydantic.json_schema import models_json_schema

from loraplex_server.api.http_errors import STATUS_OF_TYPE, ErrorBody, OpenAIErrorBody
from loraplex_server.api.routes.models import Model, ModelList
from loraplex_server.api.schemas.tgi import CompatGenerateBody, GenerateAnswer, GenerateBody, StreamEvent
from loraplex_server.text.tokenizer import TokenSpan

_REF = "#/components/schemas/{name}"
_EXAMPLE = {"inputs": "Where is the treasure?", "parameters": {"max_new_tokens": 40}}
_STREAM_NOTE = "One server-sent event a token; an error is an event too."
# The error types a generation can end with, by status.
_GENERATION_ERRORS = (400, 401, 404, 413, 415, 422, 424, 429, 500, 503)


@functools.cache
def openapi_document() -> dict[str, Any]:
    """OpenAPI 3.1 for every route."""
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "loraplex",
            "description": "One base model, many LoRA adapters, one server. Text Generation Inference's routes.",
            "version": "1",
            "license": {"name": "Apache 2.0", "identifier": "Apache-2.0"},
        },
        "paths": {
            "/generate": {"post": _post("Generate text", "GenerateBody", {"application/json": _ref("GenerateAnswer")})},
            "/generate_stream": {
                "post": _post(
                    f"Generate text, token by token. {_STREAM_NOTE}",
                    "GenerateBody",
                    {"text/event-stream": _ref("StreamEvent")},
                )
            },
            "/": {
                "post": _post(
                    "Generate text: a list of one answer, or the stream of /generate_stream with `stream`. The prompt "
                    "stands in front of the text unless `return_full_text` is false.",
                    "CompatGenerateBody",
                    {
                        "application/json": {"type": "array", "items": _ref("GenerateAnswer")},
                        "text/event-stream": _ref("StreamEvent"),
                    },
                ),
                "get": _get("Whether requests can be served", None, also=(503,)),
            },
            "/tokenize": {
                "post": _post(
                    "The prompt's tokens and their places in the text",
                    "GenerateBody",
                    {"application/json": {"type": "array", "items": _ref("TokenSpan")}},
                )
            },
            "/v1/models": {"get": _get("The base model, then the adapters", _ref("ModelList"))},
            "/v1/models/{model_id}": {
                "get": _get("One model or adapter", _ref("Model"), also=(404,))
                | {"parameters": [{"name": "model_id", "in": "path", "required": True, "schema": {"type": "string"}}]}
            },
            "/health": {"get": _get("Whether requests can be served", None, also=(503,))},
            "/ping": {"get": _get("The same as /health", None, also=(503,))},
            "/info": {"get": _get("The model and the limits", {"type": "object"}, also=(503,))},
            "/metrics": {"get": _get("Prometheus metrics", {"type": "string"}, media_type="text/plain")},
        },
        "components": {
            "schemas": _component_schemas(),
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def _component_schemas() -> dict[str, Any]:
    _, bodies = models_json_schema(
        [(GenerateBody, "validation"), (CompatGenerateBody, "validation")], ref_template=_REF.format(name="{model}")
    )
    answers = [GenerateAnswer, StreamEvent, ModelList, Model, ErrorBody, OpenAIErrorBody, list[TokenSpan]]
    _, structs = msgspec.json.schema_components(answers, ref_template=_REF)
    return {**bodies["$defs"], **structs}


def _ref(name: str) -> dict[str, Any]:
    return {"$ref": _REF.format(name=name)}


def _errors(statuses: tuple[int, ...], schema: str) -> dict[str, Any]:
    return {
        str(status): {
            "description": " or ".join(name for name, number in STATUS_OF_TYPE.items() if number == status),
            "content": {"application/json": {"schema": _ref(schema)}},
        }
        for status in statuses
    }


def _post(summary: str, body: str, answers: dict[str, Any]) -> dict[str, Any]:
    return {
        "summary": summary,
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": _ref(body), "example": _EXAMPLE}},
        },
        "responses": {
            "200": {
                "description": "the answer",
                "content": {media_type: {"schema": schema} for media_type, schema in answers.items()},
            },
            **_errors(_GENERATION_ERRORS, "ErrorBody"),
        },
        "security": [{"key": []}],
    }


def _get(
    summary: str,
    schema: dict[str, Any] | None,
    *,
    also: tuple[int, ...] = (),
    media_type: str = "application/json",
) -> dict[str, Any]:
    content = {} if schema is None else {"content": {media_type: {"schema": schema}}}
    return {
        "summary": summary,
        "responses": {"200": {"description": "the answer", **content}} | _errors(also, "ErrorBody"),
    }
