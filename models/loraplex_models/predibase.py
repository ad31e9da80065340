"""Where Predibase keeps an adapter: asked of its gateway with the caller's token."""

import json
import urllib.error
import urllib.request
from http.client import HTTPException
from urllib.parse import quote

from loraplex_models.sources import SourceForbidden, SourceFormatError, SourceNotFound, SourceUnavailable

DEFAULT_GATEWAY = "https://api.app.predibase.com"
ANSWER_TIMEOUT_S = 10.0
MAX_ANSWER_BYTES = 2**20
NOT_READY = ("pending", "queued", "stopping")


def adapter_path(gateway: str | None, adapter_id: str, token: str | None) -> str:
    """The place in S3 of `repo/version`. Raises SourceError."""
    if not token:
        raise SourceForbidden("api_token must be provided for an adapter of source pbase")
    repo, _, version = adapter_id.rpartition("/")
    if not repo:
        raise SourceFormatError(f"'{adapter_id}' names no version: write repo/version")
    url = (
        f"{(gateway or DEFAULT_GATEWAY).rstrip('/')}/v2/repos/{quote(repo, safe='')}/version/{quote(version, safe='')}"
    )
    request = urllib.request.Request(url, headers={"authorization": f"Bearer {token}"})
    try:
        with urllib.request.urlopen(request, timeout=ANSWER_TIMEOUT_S) as answer:
            found = json.loads(answer.read(MAX_ANSWER_BYTES))
    except urllib.error.HTTPError as error:
        error.close()
        if error.code in (401, 403, 404):
            raise SourceNotFound(f"Predibase has no '{adapter_id}' for this token") from None
        raise SourceUnavailable(f"Predibase answers {error.code}; try again later") from None
    except (urllib.error.URLError, TimeoutError, HTTPException, ConnectionError, ValueError) as error:
        raise SourceUnavailable(f"Predibase cannot be asked: {type(error).__name__}; try again later") from None
    path = found.get("adapterPath") if isinstance(found, dict) else None
    status = str(found.get("status", "")).lower() if isinstance(found, dict) else ""
    if status in NOT_READY:
        raise SourceUnavailable(f"Adapter {adapter_id} is not ready for use. Current status: {status[:40]}.")
    if not isinstance(path, str) or not path:
        raise SourceNotFound(f"Predibase names no files for '{adapter_id}'")
    return path
