"""The exceptions that reach a client, in one tree.

    LoraplexError
    ├── InvalidRequest              422 validation: a field is out of bounds
    │   ├── MalformedRequest        422 validation: a field is missing or of the wrong type
    │   ├── InvalidBody             400 invalid_json: the body does not parse
    │   ├── TemplateFailed          422 template_error: the model's chat template refuses, or there is none
    │   └── ToolFailed              422 tool_error: `tools`, `tool_choice` or a tool's message is wrong
    ├── BodyTooLarge                413 payload_too_large
    ├── HeadersTooLarge             431 headers_too_large
    ├── BodyTimeout                 408 timeout: the body came too slowly
    ├── UnsupportedMediaType        415 unsupported_media_type
    ├── Unauthorized                401 unauthorized
    ├── NotServed                   404 not_found: the route is known, and this model cannot do it
    ├── Forbidden                   403 forbidden: the caller may not change the server
    ├── AdapterError
    │   ├── AdapterNotFound         404 adapter_not_found
    │   ├── AdapterForbidden        403 adapter_forbidden: the source refuses
    │   ├── AdapterRefused          422 adapter_invalid | adapter_incompatible | adapter_unsupported | adapter_too_large
    │   └── AdapterUnavailable      424 adapter_unavailable: the source is down or too slow
    ├── Overloaded                  429 overloaded
    ├── ClientGone                  499 client_closed_request: nobody reads it
    ├── GenerationFailed            424 generation: the engine failed on this request
    ├── IncompleteGeneration        500 incomplete_generation: the token stream ended early
    └── NotReady                    503 healthcheck: before the first ready, or while stopping

Only `api/http_errors.py` knows status codes; the numbers above are for the reader.
"""

from copy import copy
from typing import Self


class LoraplexError(Exception):
    """The root: `error_type` is the word a client sees, the message says cause, limit and fix."""

    error_type = "internal"


class InvalidRequest(LoraplexError):
    """A field of the request is missing, of the wrong type or out of bounds."""

    error_type = "validation"


class InvalidBody(InvalidRequest):
    """The body is not JSON."""

    error_type = "invalid_json"


class MalformedRequest(InvalidRequest):
    """The body is JSON, but a field is missing or of the wrong type; the message is whole as it is."""


class TemplateFailed(InvalidRequest):
    """The model's chat template cannot render the messages; or the model has none."""

    error_type = "template_error"


class ToolFailed(InvalidRequest):
    """The tools of a request, its choice among them, or a tool's answer are not what they must be."""

    error_type = "tool_error"


class BodyTooLarge(LoraplexError):
    """The body is larger than the server reads."""

    error_type = "payload_too_large"


class HeadersTooLarge(LoraplexError):
    """The headers are larger or more than the server accepts."""

    error_type = "headers_too_large"


class BodyTimeout(LoraplexError):
    """The body did not arrive in time."""

    error_type = "timeout"


class UnsupportedMediaType(LoraplexError):
    """The body is not announced as JSON."""

    error_type = "unsupported_media_type"


class Unauthorized(LoraplexError):
    """The API key is missing or wrong."""

    error_type = "unauthorized"


class Forbidden(LoraplexError):
    """The caller may use the server but not change it."""

    error_type = "forbidden"


class NotServed(LoraplexError):
    """The route is for another kind of model."""

    error_type = "not_found"


class AdapterError(LoraplexError):
    """The adapter that a request names cannot serve it."""

    error_type = "adapter_unavailable"

    def within(self, what: str) -> Self:
        """The same of a part of what was asked for."""
        error = copy(self)
        error.args = (f"{what}: {self}",)
        return error


class AdapterNotFound(AdapterError):
    """No adapter of that name is known."""

    error_type = "adapter_not_found"


class AdapterForbidden(AdapterError):
    """The adapter's source refuses access."""

    error_type = "adapter_forbidden"


class AdapterRefused(AdapterError):
    """The adapter's files are broken, do not fit the base model, need what is not served, or are too large."""

    def __init__(self, message: str, error_type: str = "adapter_invalid"):
        super().__init__(message)
        self.error_type = error_type


class AdapterUnavailable(AdapterError):
    """The adapter's source is down or too slow; a later try may work."""


class Overloaded(LoraplexError):
    """More requests than the server admits; a later try may work."""

    error_type = "overloaded"


class GenerationFailed(LoraplexError):
    """The engine failed while it worked on this request."""

    error_type = "generation"


class ClientGone(LoraplexError):
    """The client closed the connection before its answer was there."""

    error_type = "client_closed_request"


class IncompleteGeneration(LoraplexError):
    """The engine's token stream ended without a finish reason."""

    error_type = "incomplete_generation"


class NotReady(LoraplexError):
    """The server is loading or stopping."""

    error_type = "healthcheck"
