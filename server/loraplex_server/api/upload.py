"""The files of an uploaded adapter: multipart/form-data, streamed to disk, bounded, and nothing but the two files.

There are no archives to unpack and no paths to follow: a part is named exactly as one of the two files.
"""

import asyncio
import contextlib
from collections.abc import Callable
from email.message import Message
from io import BufferedWriter
from pathlib import Path
from typing import Any, cast

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser
from starlette.requests import ClientDisconnect, Request

from loraplex_models.sources import ADAPTER_FILES
from loraplex_server.errors import BodyTimeout, BodyTooLarge, InvalidBody, InvalidRequest, UnsupportedMediaType

# Between two pieces of a body.
PIECE_TIMEOUT_S = 30
# What is written at a time, in a thread.
WRITE_BYTES = 2**20
MEDIA_TYPE = "multipart/form-data"


def is_upload(request: Request) -> bool:
    """Whether the body says that it brings files."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower() == MEDIA_TYPE


async def receive_files(request: Request, folder: Path, max_bytes: int) -> None:
    """Write both files of the body into `folder`.

    Raises InvalidRequest for a part that is none of them, or is missing; BodyTooLarge, BodyTimeout, InvalidBody.
    OSError when the disk refuses.
    """
    parts = _Parts(folder, max_bytes)
    parser = MultipartParser(_boundary(request), cast(Any, parts.callbacks()))
    pieces = request.stream()
    waiting = bytearray()
    try:
        with contextlib.closing(parts):
            while True:
                async with asyncio.timeout(PIECE_TIMEOUT_S):
                    piece = await anext(pieces, None)
                if piece is not None:
                    waiting += piece
                if waiting and (piece is None or len(waiting) >= WRITE_BYTES):
                    await asyncio.to_thread(parser.write, bytes(waiting))
                    waiting.clear()
                if piece is None:
                    break
    except TimeoutError as error:
        raise BodyTimeout(f"no piece of the body arrived for {PIECE_TIMEOUT_S} s") from error
    except ClientDisconnect as error:
        raise InvalidBody("the request's body was cut") from error
    except FormParserError as error:
        raise InvalidBody(f"the body is not {MEDIA_TYPE}: {error}") from None
    if not parts.is_complete:
        raise InvalidBody("the body ends before its last boundary: it was cut")
    missing = [name for name in ADAPTER_FILES if name not in parts.received]
    if missing:
        raise InvalidRequest(
            f"the upload has no {' and no '.join(missing)}: send both files, as in"
            " curl -X PUT -F file=@adapter_config.json -F file=@adapter_model.safetensors URL/adapters/NAME"
        )


def _boundary(request: Request) -> bytes:
    header = Message()
    header["content-type"] = request.headers.get("content-type", "")
    boundary = header.get_param("boundary")
    if header.get_content_type() != MEDIA_TYPE or not isinstance(boundary, str) or not boundary.isascii():
        raise UnsupportedMediaType(f"Expected request with `Content-Type: {MEDIA_TYPE}; boundary=…`")
    return boundary.encode()


class _Parts:
    """What the parser finds, written to files as it comes."""

    def __init__(self, folder: Path, max_bytes: int):
        self.received: set[str] = set()
        self.is_complete = False
        self._folder = folder
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._header = b""
        self._value = b""
        self._disposition = ""
        self._file: BufferedWriter | None = None

    def callbacks(self) -> dict[str, Callable[..., None]]:
        """What the parser calls, by its own names."""
        return {
            "on_part_begin": self._begin,
            "on_header_field": self._header_field,
            "on_header_value": self._header_value,
            "on_header_end": self._header_end,
            "on_headers_finished": self._open,
            "on_part_data": self._write,
            "on_part_end": self.close,
            "on_end": self._end,
        }

    def close(self) -> None:
        """Close the file of the part that has ended."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _begin(self) -> None:
        self._disposition = ""

    def _header_field(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _header_end(self) -> None:
        if self._header.lower() == b"content-disposition":
            self._disposition = self._value.decode("latin-1")
        self._header = self._value = b""

    def _open(self) -> None:
        header = Message()
        header["content-disposition"] = self._disposition
        name = header.get_filename()
        if name not in ADAPTER_FILES:
            shown = "a part without a file's name" if name is None else f"a part named {name[:100]!r}"
            raise InvalidRequest(f"the upload has {shown}: an adapter is {' and '.join(ADAPTER_FILES)}, nothing else")
        if name in self.received:
            raise InvalidRequest(f"the upload has {name} twice")
        self.received.add(name)
        self._file = (self._folder / name).open("xb")

    def _write(self, data: bytes, start: int, end: int) -> None:
        self._num_bytes += end - start
        if self._num_bytes > self._max_bytes:
            raise BodyTooLarge(f"the adapter's files are larger than {self._max_bytes} bytes (--max-adapter-mb)")
        assert self._file is not None, "data comes inside a part"
        self._file.write(memoryview(data)[start:end])

    def _end(self) -> None:
        self.is_complete = True
