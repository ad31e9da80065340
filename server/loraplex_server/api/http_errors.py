"""Exceptions → status, headers and body, in the dialect of the route. Nothing else knows status codes."""

import logging
from typing import Any

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from loraplex_server.errors import GenerationFailed, InvalidRequest, LoraplexError, TemplateFailed, ToolFailed

logger = logging.getLogger(__name__)

STATUS_OF_TYPE = {
    "invalid_json": 400,
    "unauthorized": 401,
    "forbidden": 403,
    "adapter_forbidden": 403,
    "not_found": 404,
    "adapter_not_found": 404,
    "method_not_allowed": 405,
    "timeout": 408,
    "payload_too_large": 413,
    "unsupported_media_type": 415,
    "validation": 422,
    "template_error": 422,
    "tool_error": 422,
    "adapter_invalid": 422,
    "adapter_incompatible": 422,
    "adapter_unsupported": 422,
    "adapter_too_large": 422,
    "generation": 424,
    "adapter_unavailable": 424,
    "overloaded": 429,
    "headers_too_large": 431,
    "client_closed_request": 499,
    "internal": 500,
    "incomplete_generation": 500,
    "incomplete_generation_stream": 500,
    "healthcheck": 503,
}
TYPE_OF_STATUS = {404: "not_found", 405: "method_not_allowed"}
# TGI puts these in front of the cause.
PREFIXES: dict[type[LoraplexError], str] = {
    InvalidRequest: "Input validation error: ",
    TemplateFailed: "Template error: ",
    ToolFailed: "Tool error: ",
    GenerationFailed: "Request failed during generation: ",
}
RETRY_AFTER_S = {"overloaded": 1, "adapter_unavailable": 5, "healthcheck": 1}


class ErrorBody(msgspec.Struct, frozen=True):
    """The body of an error on the native routes."""

    error: str
    error_type: str


class OpenAIErrorDetail(msgspec.Struct, frozen=True):
    """What went wrong, in OpenAI's words."""

    message: str
    type: str
    param: str | None
    code: str | None


class OpenAIErrorBody(msgspec.Struct, frozen=True):
    """The body of an error on the `/v1` routes; `error_type` is for TGI's and Hugging Face's clients."""

    error: OpenAIErrorDetail
    error_type: str


INTERNAL_ERROR = ErrorBody("internal error; the server's log has the cause under this request's id", "internal")


def error_body(error: LoraplexError) -> ErrorBody:
    """What a client of the native routes reads, as a body or as the last event of a stream."""
    return ErrorBody(PREFIXES.get(type(error), "") + str(error), error.error_type)


def openai_error_body(body: ErrorBody) -> OpenAIErrorBody:
    """The same as a client of the `/v1` routes reads it."""
    code = "model_not_found" if body.error_type == "adapter_not_found" else None
    return OpenAIErrorBody(OpenAIErrorDetail(body.error, body.error_type, None, code), body.error_type)


def error_response(error: LoraplexError, path: str) -> Response:
    """The answer to a request that failed."""
    headers = {}
    status = STATUS_OF_TYPE[error.error_type]
    if error.error_type in RETRY_AFTER_S:
        headers["retry-after"] = str(RETRY_AFTER_S[error.error_type])
    elif status >= 500:
        headers["x-should-retry"] = "false"
    if error.error_type == "unauthorized":
        headers["www-authenticate"] = "Bearer"
    if error.error_type in ("payload_too_large", "headers_too_large", "timeout"):
        headers["connection"] = "close"  # the rest of the body is not read
    return _response(error_body(error), status, path, headers)


async def handle_loraplex_error(request: Request, error: Exception) -> Response:
    """The exception handler of our own tree."""
    assert isinstance(error, LoraplexError)
    request.state.error_type = error.error_type
    return error_response(error, request.url.path)


async def handle_http_exception(request: Request, error: Exception) -> Response:
    """The exception handler of the router's refusals: no such path, wrong method."""
    assert isinstance(error, HTTPException)
    error_type = TYPE_OF_STATUS.get(error.status_code, "validation")
    text = str(error.detail)
    if error.status_code == 404:
        text = "there is no such route; /docs lists those there are"
    elif error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "")
        text = f"the method {request.method[:16]} is not allowed here; allowed: {allowed}"
    request.state.error_type = error_type
    return _response(ErrorBody(text, error_type), error.status_code, request.url.path, dict(error.headers or {}))


def internal_error_response(path: str) -> Response:
    """The answer to our own mistake: its cause is in the log, not here."""
    return _response(INTERNAL_ERROR, 500, path, {"x-should-retry": "false"})


def _response(body: ErrorBody, status: int, path: str, headers: dict[str, str]) -> Response:
    content: Any = body
    if path.startswith("/v1/"):
        content = openai_error_body(body)
    return Response(msgspec.json.encode(content), status, headers, media_type="application/json")
