"""From a source's refusal to the error that a request is answered with."""

from loraplex_models.sources import SourceError, SourceForbidden, SourceFormatError, SourceUnavailable
from loraplex_server.errors import AdapterError, AdapterForbidden, AdapterNotFound, AdapterUnavailable, InvalidRequest


def adapter_error(error: SourceError, message: str) -> AdapterError | InvalidRequest:
    """A source's refusal as requests see it."""
    match error:
        case SourceForbidden():
            return AdapterForbidden(message)
        case SourceUnavailable():
            return AdapterUnavailable(message)
        case SourceFormatError():
            return InvalidRequest(message)
        case _:
            return AdapterNotFound(message)
