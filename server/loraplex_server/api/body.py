"""A request's JSON body: read with a time limit, parsed strictly, checked against its schema."""

import asyncio
import re
from collections.abc import Callable
from typing import Any, TypeVar

import msgspec
from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect, Request

from loraplex_server.errors import BodyTimeout, InvalidBody, MalformedRequest, UnsupportedMediaType

BODY_TIMEOUT_S = 30
# Above it the parse (5 ms a MB) goes to a thread.
PARSE_IN_THREAD_BYTES = 200_000

_decode = msgspec.json.Decoder().decode
_byte_position = re.compile(r" \(byte (\d+)\)$")

Body = TypeVar("Body", bound=BaseModel)


async def read_body(request: Request, schema: type[Body]) -> Body:
    """The body as `schema`, or the refusal that says what is wrong with it."""
    return await read_one_of(request, lambda _: schema)


async def read_one_of(request: Request, choose: Callable[[dict[str, Any]], type[Body]]) -> Body:
    """The body as the schema that `choose` finds for its fields, or the refusal."""
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json" and not (
        media_type.startswith("application/") and media_type.endswith("+json")
    ):
        raise UnsupportedMediaType("Expected request with `Content-Type: application/json`")
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            raw = await request.body()
    except TimeoutError as error:
        raise BodyTimeout(f"the request's body did not arrive within {BODY_TIMEOUT_S} s") from error
    except ClientDisconnect as error:
        raise InvalidBody("the request's body was cut") from error
    if len(raw) > PARSE_IN_THREAD_BYTES:
        return await asyncio.to_thread(_parse_one_of, raw, choose)
    return _parse_one_of(raw, choose)


def _parse_one_of(raw: bytes, choose: Callable[[dict[str, Any]], type[Body]]) -> Body:
    value = _parse(raw)
    if not isinstance(value, dict):
        raise MalformedRequest(f"{_MALFORMED}: expected a JSON object, got {_json_name(value)}")
    try:
        return choose(value).model_validate(value)
    except ValidationError as error:
        raise MalformedRequest(f"{_MALFORMED}: {_first_finding(error)}") from error


_MALFORMED = "Failed to deserialize the JSON body into the target type"


def _parse(raw: bytes) -> Any:
    try:
        return _decode(raw)
    except msgspec.ValidationError as error:
        # It is JSON; a number has no finite value.
        raise MalformedRequest(f"{_MALFORMED}: {str(error).partition(' - ')[0]}") from error
    except msgspec.DecodeError as error:
        raise InvalidBody(f"Failed to parse the request body as JSON: {_with_line(str(error), raw)}") from error
    except UnicodeDecodeError as error:
        raise InvalidBody("Failed to parse the request body as JSON: it is not UTF-8") from error
    except RecursionError as error:
        raise InvalidBody("Failed to parse the request body as JSON: it is nested too deeply") from error


def _with_line(message: str, raw: bytes) -> str:
    position = _byte_position.search(message)
    if position is None:
        return message
    before = raw[: int(position[1])]
    line = before.count(b"\n") + 1
    column = len(before) - before.rfind(b"\n")
    return f"{message[: position.start()]} at line {line} column {column}"


def _first_finding(error: ValidationError) -> str:
    finding = error.errors(include_url=False, include_input=False)[0]
    field = ".".join(str(part) for part in finding["loc"])
    if finding["type"] == "missing":
        return f"{field}: missing field `{finding['loc'][-1]}`"
    return f"{field}: {finding['msg']}"


def _json_name(value: Any) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return "a boolean"
        case int() | float():
            return "a number"
        case str():
            return "a string"
        case _:
            return "a list"
