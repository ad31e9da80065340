"""The OpenAPI document, from the schemas that the routes use."""

import functools
from typing import Any

import msgspec
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from loraplex_server.api.http_errors import STATUS_OF_TYPE, ErrorBody, OpenAIErrorBody
from loraplex_server.api.routes.models import Model, ModelList
from loraplex_server.api.routes.platforms import Predictions, VertexBody
from loraplex_server.api.routes.probes import OTHER_MODELS_PATHS
from loraplex_server.api.routes.tokenize import ChatTokens, DetokenizedText, TokenCount
from loraplex_server.api.schemas.adapters import (
    AdapterInfo,
    AdapterList,
    ChangeBody,
    LoadLoraBody,
    RegisterBody,
    UnloadLoraBody,
)
from loraplex_server.api.schemas.openai import ChatBody, CompletionBody, DetokenizeBody
from loraplex_server.api.schemas.openai_answers import ChatAnswer, ChatChunk, CompletionAnswer
from loraplex_server.api.schemas.responses import ResponsesBody
from loraplex_server.api.schemas.responses_answers import ResponsesAnswer
from loraplex_server.api.schemas.tgi import CompatGenerateBody, GenerateAnswer, GenerateBody, StreamEvent
from loraplex_server.text.tokenizer import TokenSpan

_REF = "#/components/schemas/{name}"
_EXAMPLE = {"inputs": "Where is the treasure?", "parameters": {"max_new_tokens": 40}}
_CHAT_EXAMPLE = {"messages": [{"role": "user", "content": "Where is the treasure?"}], "max_tokens": 40}
_COMPLETION_EXAMPLE = {"prompt": "Where is the treasure?", "max_tokens": 40}
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
            "description": "One base model, many LoRA adapters, one server. TGI's routes, and OpenAI's.",
            "version": "1",
            "license": {"name": "Apache 2.0", "identifier": "Apache-2.0"},
        },
        "paths": {
            "/generate": {"post": _post("Generate text", "GenerateBody", {"application/json": _ref("GenerateAnswer")})},
            "/generate_stream": {
                "post": _post(
                    f"Generate text, token by token. {_STREAM_NOTE}",
                    "GenerateBody",
                    {"text/event-stream": _events("StreamEvent", "ErrorBody")},
                )
            },
            "/": {
                "post": _post(
                    "Generate text: a list of one answer, or the stream of /generate_stream with `stream`. The prompt "
                    "stands in front of the text unless `return_full_text` is false.",
                    "CompatGenerateBody",
                    {
                        "application/json": {"type": "array", "items": _ref("GenerateAnswer")},
                        "text/event-stream": _events("StreamEvent", "ErrorBody"),
                    },
                ),
                "get": _get("Whether requests can be served", None, also=(503,)),
            },
            "/tokenize": {
                "post": _post(
                    "The tokens of `inputs` and their places in the text. With `prompt` or `messages` instead: the "
                    "token ids, as vLLM answers.",
                    "GenerateBody",
                    {
                        "application/json": {
                            "anyOf": [{"type": "array", "items": _ref("TokenSpan")}, _ref("TokenCount")]
                        }
                    },
                )
            },
            "/detokenize": {
                "post": _post(
                    "The text of token ids",
                    "DetokenizeBody",
                    {"application/json": _ref("DetokenizedText")},
                    example={"tokens": [28120, 905]},
                )
            },
            "/chat_tokenize": {
                "post": _post(
                    "The prompt that the chat template makes of the messages, and its tokens",
                    "ChatBody",
                    {"application/json": _ref("ChatTokens")},
                    example=_CHAT_EXAMPLE,
                )
            },
            "/v1/chat/completions": {
                "post": _post(
                    "Answer a conversation, as OpenAI; `model` is the base, an adapter, or base:adapter",
                    "ChatBody",
                    {
                        "application/json": _ref("ChatAnswer"),
                        "text/event-stream": _events("ChatChunk", "OpenAIErrorBody"),
                    },
                    example=_CHAT_EXAMPLE,
                    error="OpenAIErrorBody",
                )
            },
            "/v1/completions": {
                "post": _post(
                    "Continue one prompt or several, as OpenAI",
                    "CompletionBody",
                    {
                        "application/json": _ref("CompletionAnswer"),
                        "text/event-stream": _events("CompletionAnswer", "OpenAIErrorBody"),
                    },
                    example=_COMPLETION_EXAMPLE,
                    error="OpenAIErrorBody",
                )
            },
            "/v1/responses": {
                "post": _post(
                    "Answer an input, as OpenAI's Responses API: text and calls of functions, nothing stored",
                    "ResponsesBody",
                    {"application/json": _ref("ResponsesAnswer"), "text/event-stream": {"type": "object"}},
                    example={"input": "Where is the treasure?", "max_output_tokens": 40},
                    error="OpenAIErrorBody",
                )
            },
            "/invocations": {
                "post": _post(
                    "SageMaker's route: a body of POST /, of chat or of completions, and that route's answer",
                    "CompatGenerateBody",
                    {
                        "application/json": {
                            "anyOf": [
                                {"type": "array", "items": _ref("GenerateAnswer")},
                                _ref("ChatAnswer"),
                                _ref("CompletionAnswer"),
                            ]
                        },
                        "text/event-stream": _events("StreamEvent", "ChatChunk", "CompletionAnswer", "ErrorBody"),
                    },
                )
            },
            "/vertex": {
                "post": _post(
                    "Vertex AI's route: a text for each instance",
                    "VertexBody",
                    {"application/json": _ref("Predictions")},
                    example={"instances": [_EXAMPLE]},
                )
            },
            "/v1/models": {"get": _get("The base model, then the adapters", _ref("ModelList"))},
            "/v1/models/{model_id}": {
                "get": _get("One model or adapter", _ref("Model"), also=(404, 422), error="OpenAIErrorBody")
                | {"parameters": [{"name": "model_id", "in": "path", "required": True, "schema": {"type": "string"}}]}
            },
            **_adapter_paths(),
            "/health": {"get": _get("Whether requests can be served", None, also=(503,))},
            "/ping": {"get": _get("The same as /health", None, also=(503,))},
            "/health/live": {"get": _get("Whether the process answers, ready or not", None)},
            "/health/ready": {"get": _get("The same as /health", None, also=(503,))},
            "/startup": {"get": _get("The same as /health", None, also=(503,))},
            "/version": {"get": _get("Our version, as vLLM", {"type": "object"})},
            "/load": {"get": _get("The sequences in flight, as vLLM", {"type": "object"}, also=(503,))},
            "/tokenizer_info": {
                "get": _get("Special tokens and the chat template, as vLLM", {"type": "object"}, also=(503,))
            },
            **{path: {"post": _refused(path)} for path in OTHER_MODELS_PATHS},
            "/info": {"get": _get("The model and the limits", {"type": "object"}, also=(503,))},
            "/metrics": {"get": _get("Prometheus metrics", {"type": "string"}, media_type="text/plain")},
        },
        "components": {
            "schemas": _component_schemas(),
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def _adapter_paths() -> dict[str, Any]:
    """The routes that show and change adapters; changes need the right to them (403)."""
    by_name = {"parameters": [{"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}]}
    info, text, outcome = (
        {"application/json": _ref("AdapterInfo")},
        {"text/plain": {"type": "string"}},
        {"application/json": _ref("LoadedAdapters")},
    )
    vllm, sglang = ("VllmErrorBody", "OpenAIErrorBody"), ("LoadedAdapters", "ErrorBody")
    load = {"lora_name": "legal", "lora_path": "my-org/legal"}
    unload = {"lora_name": "legal"}
    register = {"name": "legal", "id": "my-org/legal"}
    return {
        "/v1/load_lora_adapter": {"post": _change("vLLM: serve an adapter", "LoadLoraBody", text, load, *vllm)},
        "/v1/unload_lora_adapter": {"post": _change("vLLM: forget an adapter", "UnloadLoraBody", text, unload, *vllm)},
        "/load_lora_adapter": {"post": _change("SGLang: serve an adapter", "LoadLoraBody", outcome, load, *sglang)},
        "/unload_lora_adapter": {
            "post": _change("SGLang: forget an adapter", "UnloadLoraBody", outcome, unload, *sglang)
        },
        "/adapters": {
            "get": _get("Every adapter, its versions and where they are", _ref("AdapterList")),
            "post": _change("Serve an adapter under a name, by its source", "RegisterBody", info, register),
        },
        "/adapters/{name}": {
            "get": _get("One adapter", _ref("AdapterInfo"), also=(404, 422)) | by_name,
            "put": _upload_too(_change("Upload files; split, activate or pin", "ChangeBody", info, {"active": "2"}))
            | by_name,
            "delete": {
                "summary": "Forget an adapter, or with name@version one version of it",
                "responses": {"204": {"description": "forgotten"}, **_errors((401, 403, 404, 422), "ErrorBody")},
                "security": [{"key": []}],
            }
            | by_name,
        },
    }


def _change(summary: str, body: str, answers: dict[str, Any], example: dict[str, Any], *errors: str) -> dict[str, Any]:
    operation = _post(summary, body, answers, example=example)
    operation["responses"] |= _errors((*_GENERATION_ERRORS, 403, 409), *(errors or ("ErrorBody",)))
    return operation


def _upload_too(operation: dict[str, Any]) -> dict[str, Any]:
    """The same operation with the two files of an adapter as another body."""
    files = {"type": "array", "minItems": 2, "maxItems": 2, "items": {"type": "string", "format": "binary"}}
    schema = {"type": "object", "required": ["file"], "properties": {"file": files}}
    operation["requestBody"]["content"]["multipart/form-data"] = {"schema": schema}
    return operation


# What the managers of vLLM's and SGLang's servers read from the routes that change adapters.
_ADAPTER_ANSWERS: dict[str, Any] = {
    "VllmErrorBody": {
        "type": "object",
        "required": ["error"],
        "properties": {
            "error": {
                "type": "object",
                "required": ["message", "type", "param", "code"],
                "properties": {"message": {"type": "string"}, "type": {"type": "string"}, "code": {"type": "integer"}},
            },
            "message": {"type": "string"},
        },
    },
    "LoadedAdapters": {
        "type": "object",
        "required": ["success", "error_message", "loaded_adapters"],
        "properties": {
            "success": {"type": "boolean"},
            "error_message": {"type": "string"},
            "loaded_adapters": {"type": "object", "additionalProperties": {"type": "string"}},
        },
    },
}


def _component_schemas() -> dict[str, Any]:
    schemas: tuple[type[BaseModel], ...] = (
        GenerateBody,
        CompatGenerateBody,
        ChatBody,
        CompletionBody,
        ResponsesBody,
        DetokenizeBody,
        VertexBody,
        LoadLoraBody,
        UnloadLoraBody,
        RegisterBody,
        ChangeBody,
    )
    _, bodies = models_json_schema(
        [(schema, "validation") for schema in schemas], ref_template=_REF.format(name="{model}")
    )
    answers = [
        *(GenerateAnswer, StreamEvent, ModelList, Model, ErrorBody, OpenAIErrorBody, list[TokenSpan]),
        *(AdapterInfo, AdapterList, ResponsesAnswer),
        *(ChatAnswer, ChatChunk, CompletionAnswer, TokenCount, DetokenizedText, ChatTokens, Predictions),
    ]
    _, structs = msgspec.json.schema_components(answers, ref_template=_REF)
    return {**bodies["$defs"], **structs, **_ADAPTER_ANSWERS}


def _ref(name: str) -> dict[str, Any]:
    return {"$ref": _REF.format(name=name)}


def _errors(statuses: tuple[int, ...], *schemas: str) -> dict[str, Any]:
    options = [_ref(schema) for schema in schemas]
    return {
        str(status): {
            "description": " or ".join(name for name, number in STATUS_OF_TYPE.items() if number == status),
            "content": {"application/json": {"schema": options[0] if len(options) == 1 else {"anyOf": options}}},
        }
        for status in statuses
    }


def _events(*schemas: str) -> dict[str, Any]:
    """Server-sent events whose data is JSON of one of the schemas, or [DONE]."""
    data = {
        "type": "string",
        "contentMediaType": "application/json",
        "contentSchema": {"anyOf": [_ref(schema) for schema in schemas]},
    }
    data_or_end = {"anyOf": [{"const": "[DONE]"}, data]}
    return {"type": "object", "required": ["data"], "properties": {"event": {"type": "string"}, "data": data_or_end}}


def _post(
    summary: str,
    body: str,
    answers: dict[str, Any],
    *,
    example: dict[str, Any] = _EXAMPLE,
    error: str = "ErrorBody",
) -> dict[str, Any]:
    return {
        "summary": summary,
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": _ref(body), "example": example}},
        },
        "responses": {
            "200": {
                "description": "the answer",
                "content": {media_type: {"schema": schema} for media_type, schema in answers.items()},
            },
            **_errors(_GENERATION_ERRORS, error),
        },
        "security": [{"key": []}],
    }


def _refused(path: str) -> dict[str, Any]:
    """A route that a model which generates text cannot serve."""
    return {
        "summary": "Refused: for embedding and classification models",
        "responses": _errors((401, 404, 413), "OpenAIErrorBody" if path.startswith("/v1/") else "ErrorBody"),
        "security": [{"key": []}],
    }


def _get(
    summary: str,
    schema: dict[str, Any] | None,
    *,
    also: tuple[int, ...] = (),
    media_type: str = "application/json",
    error: str = "ErrorBody",
) -> dict[str, Any]:
    content = {} if schema is None else {"content": {media_type: {"schema": schema}}}
    return {
        "summary": summary,
        "responses": {"200": {"description": "the answer", **content}} | _errors(also, error),
    }
