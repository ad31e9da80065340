"""Files in S3 and what speaks like it: signed requests (AWS Signature Version 4), whole or from where one was cut."""

import hashlib
import hmac
import os
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from http.client import HTTPException, HTTPResponse
from io import BufferedWriter
from pathlib import Path
from urllib.parse import quote, urlsplit

from loraplex_models.part_files import held_part
from loraplex_models.s3_access import S3Access
from loraplex_models.sources import SourceError, SourceForbidden, SourceNotFound, SourceUnavailable

ANSWER_TIMEOUT_S = 10.0
PIECE_BYTES = 2**16
EMPTY_SHA256 = hashlib.sha256(b"").hexdigest()


@dataclass(frozen=True, slots=True)
class S3Object:
    """An object as it is now."""

    bucket: str
    key: str
    num_bytes: int
    etag: str


def signature_headers(
    access: S3Access, method: str, url: str, headers: Mapping[str, str], now: datetime
) -> dict[str, str]:
    """`headers` with those that sign a request without a body; the rules are Amazon's Signature Version 4."""
    parts = urlsplit(url)
    stamp = now.strftime("%Y%m%dT%H%M%SZ")
    signed = {"host": parts.netloc, "x-amz-content-sha256": EMPTY_SHA256, "x-amz-date": stamp}
    signed |= {name.lower(): value for name, value in headers.items()}
    if access.session_token:
        signed["x-amz-security-token"] = access.session_token
    names = ";".join(sorted(signed))
    request = "\n".join(
        [method, parts.path or "/", parts.query, *(f"{name}:{signed[name]}" for name in sorted(signed)), "", names]
    )
    scope = f"{stamp[:8]}/{access.region}/s3/aws4_request"
    text = "\n".join(
        ["AWS4-HMAC-SHA256", stamp, scope, hashlib.sha256(f"{request}\n{EMPTY_SHA256}".encode()).hexdigest()]
    )
    key = f"AWS4{access.secret_key}".encode()
    for word in (stamp[:8], access.region, "s3", "aws4_request"):
        key = hmac.digest(key, word.encode(), "sha256")
    signature = hmac.digest(key, text.encode(), "sha256").hex()
    credential = f"Credential={access.access_key}/{scope}"
    authorization = f"AWS4-HMAC-SHA256 {credential},SignedHeaders={names},Signature={signature}"
    return {name: value for name, value in signed.items() if name != "host"} | {"authorization": authorization}


def look_up(access: S3Access, bucket: str, key: str) -> S3Object | None:
    """An object's length and tag; None where there is none. Raises SourceError."""
    try:
        with _open(access, "HEAD", bucket, key, {}) as answer:
            return S3Object(
                bucket, key, int(answer.headers["content-length"]), answer.headers.get("etag", "").strip('"')
            )
    except SourceNotFound:
        return None


def download(access: S3Access, found: S3Object, target: Path, part: Path, on_bytes: Callable[[int], None]) -> None:
    """Bring an object to the file `target`; what has arrived is collected in `part`, also of an earlier try.

    `on_bytes` is told the bytes that are here, and may raise to end it. Raises SourceError; OSError when the disk
    refuses.
    """
    with held_part(part) as (path, file):
        if file.tell() > found.num_bytes:
            file.truncate(0)
        start = file.tell()
        if start < found.num_bytes:
            start = _receive(access, found, file, start, on_bytes)
        if start < found.num_bytes:
            raise _cut(found, start, "the connection was closed")
        file.flush()
        os.replace(path, target)


def _receive(
    access: S3Access, found: S3Object, file: BufferedWriter, start: int, on_bytes: Callable[[int], None]
) -> int:
    headers = {"if-match": f'"{found.etag}"'} | ({"range": f"bytes={start}-"} if start else {})
    with _open(access, "GET", found.bucket, found.key, headers) as answer:
        try:
            while start < found.num_bytes and (piece := answer.read1(PIECE_BYTES)):
                file.write(piece[: found.num_bytes - start])
                start += len(piece)
                on_bytes(min(start, found.num_bytes))
        except (TimeoutError, HTTPException, ConnectionError) as error:
            raise _cut(found, start, type(error).__name__) from None
    return start


def _cut(found: S3Object, start: int, cause: str) -> SourceUnavailable:
    return SourceUnavailable(
        f"the download of '{found.key}' was cut at {start} of {found.num_bytes} bytes ({cause});"
        " the next try goes on from there"
    )


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the signature to another host."""

    def redirect_request(self, *_: object) -> None:
        """Follow none."""


_opener = urllib.request.build_opener(_NoRedirects)


def _open(access: S3Access, method: str, bucket: str, key: str, headers: Mapping[str, str]) -> HTTPResponse:
    url = f"{access.address}/{quote(bucket)}/{quote(key)}"
    signed = dict(headers)
    if access.access_key and access.secret_key:
        signed = signature_headers(access, method, url, headers, datetime.now(UTC))
    what = f"'{bucket}/{key}'"
    try:
        request = urllib.request.Request(url, headers=signed, method=method)
        answer: HTTPResponse = _opener.open(request, timeout=ANSWER_TIMEOUT_S)
        return answer
    except urllib.error.HTTPError as error:
        error.close()
        raise _refusal(error.code, what) from None
    except (urllib.error.URLError, TimeoutError, HTTPException, ConnectionError) as error:
        raise SourceUnavailable(f"S3 cannot give {what}: {type(error).__name__}; try again later") from None


def _refusal(status: int, what: str) -> SourceError:
    if status in (404, 412):
        return SourceNotFound(f"S3 has no {what}")
    if status in (401, 403):
        return SourceForbidden(f"S3 refuses access to {what}: the server's credentials do not reach it")
    return SourceUnavailable(f"S3 cannot give {what}: it answers {status}; try again later")
