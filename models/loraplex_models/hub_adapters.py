"""An adapter on the hub: look it up with the caller's own token, then bring its files, resuming what was cut.

The hub library's own downloads are not used for this. They fall back to their cache where the hub refuses access, so
that one caller's private files would reach another; they do not go on where an earlier process stopped; and they cannot
be ended while bytes still trickle in.
"""

import hashlib
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from io import BufferedWriter
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, get_hf_file_metadata, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.errors import HTTPError as HubConnectionError  # type: ignore[attr-defined]  # of its HTTP client
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status  # type: ignore[attr-defined]

from loraplex_models.part_files import held_part
from loraplex_models.sources import (
    ADAPTER_FILES,
    PICKLE_FILE,
    SourceForbidden,
    SourceNotFound,
    SourceUnavailable,
    hub_errors,
    named_with_revision,
)

# For an answer's first byte, and between two pieces of a file.
ANSWER_TIMEOUT_S = 10.0
# Connections that broke without a further byte, after which a download is given up.
MAX_VAIN_TRIES = 3
HASH_CHUNK_BYTES = 2**20
_is_sha256 = re.compile(r"[0-9a-f]{64}").fullmatch
# Tells a full model from an adapter.
MODEL_CONFIG = "config.json"

# Called with the bytes that have arrived; raises a SourceError to end the download.
OnBytes = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class HubFile:
    """A file of a repository at a commit; `sha256` is known for large files."""

    name: str
    num_bytes: int
    sha256: str | None


@dataclass(frozen=True, slots=True)
class HubAdapter:
    """An adapter's files at one commit, as the hub shows them to whoever asked."""

    repo: str
    folder: str  # below the repository's root; "" is the root itself
    commit: str
    files: tuple[HubFile, ...]
    is_public: bool  # whether everybody may read it

    @property
    def num_bytes(self) -> int:
        """Bytes of all files."""
        return sum(file.num_bytes for file in self.files)


def look_up(
    repo: str,
    folder: str,
    revision: str | None,
    *,
    token: str | None,
    endpoint: str | None,
    token_hint: str,
    with_pickles: bool = False,
) -> HubAdapter:
    """Ask the hub for an adapter, without a token first: what that shows is public.

    A token is used only where nothing is shown without one, and then it must open the files themselves, whatever lies
    in a cache. `with_pickles` takes pickled weights where there are no others. Raises SourceError.
    """
    question = _Question(repo, folder, revision, endpoint, with_pickles)
    try:
        return question.ask(None, token_hint)
    except (SourceNotFound, SourceForbidden):
        if token is None:
            raise
    return question.ask(token, "the token that was sent has no access")


@dataclass(frozen=True, slots=True)
class _Question:
    """What is asked of the hub, once without a token and perhaps once with one."""

    repo: str
    folder: str
    revision: str | None
    endpoint: str | None
    with_pickles: bool

    def ask(self, token: str | None, hint: str) -> HubAdapter:
        # `False` keeps the library from using the token of this machine's user.
        access: Any = token or False
        what = named_with_revision(self.repo, self.revision)
        with hub_errors(what, hint=hint, endpoint=self.endpoint):
            api = HfApi(endpoint=self.endpoint)
            info = api.model_info(self.repo, revision=self.revision, token=access, timeout=ANSWER_TIMEOUT_S)
            names = {sibling.rfilename for sibling in info.siblings or ()}
            if info.sha is None:
                raise SourceUnavailable(f"the hub does not say which commit {what} is")
            files = [self._file(name, info.sha, access, what) for name in self._wanted(names)]
        if self.folder and not files:
            raise SourceNotFound(f"the hub has '{self.repo}' but no adapter in its folder '{self.folder}'")
        return HubAdapter(self.repo, self.folder, info.sha, tuple(files), is_public=token is None)

    def _file(self, name: str, commit: str, access: Any, what: str) -> HubFile:
        url = hf_hub_url(self.repo, name, revision=commit, endpoint=self.endpoint)
        found = get_hf_file_metadata(url, token=access, timeout=ANSWER_TIMEOUT_S, endpoint=self.endpoint)
        if found.size is None:
            raise SourceUnavailable(f"the hub does not say how long '{name}' of {what} is")
        etag = found.etag or ""
        return HubFile(name, found.size, etag if _is_sha256(etag) else None)

    def _wanted(self, names: set[str]) -> list[str]:
        """An adapter's files; where there is no config, what lets a reader tell what the repository is instead."""
        prefix = f"{self.folder}/" if self.folder else ""
        config, weights = ADAPTER_FILES
        if prefix + config not in names and not self.folder:
            below = sorted(name for name in names if name.count("/") == 1 and name.endswith(f"/{config}"))
            return [*([MODEL_CONFIG] if MODEL_CONFIG in names else []), *below[:2]]
        if self.with_pickles and prefix + weights not in names:
            weights = PICKLE_FILE
        return [prefix + name for name in (config, weights) if prefix + name in names]


def download(
    adapter: HubAdapter, target: Path, *, parts: Path, token: str | None, endpoint: str | None, on_bytes: OnBytes
) -> None:
    """Bring the files into the folder `target`, under their names below the adapter's folder.

    What has arrived of a file is kept in `parts` when a download is cut, and the next one goes on from there. Raises
    SourceError; OSError when the disk refuses.
    """
    what = named_with_revision(adapter.repo, adapter.commit)
    access = None if adapter.is_public else token
    num_before = 0
    for file in adapter.files:
        below = file.name.removeprefix(f"{adapter.folder}/") if adapter.folder else file.name
        path = target / below
        path.parent.mkdir(parents=True, exist_ok=True)
        key = hashlib.sha256(f"{adapter.repo}\n{adapter.commit}\n{file.name}".encode()).hexdigest()
        with held_part(parts / key) as (part, handle):
            _bring(adapter, file, handle, access, endpoint, what, on_bytes, num_before)
            _check_content(file, part, what)
            os.replace(part, path)
        num_before += file.num_bytes


def _bring(
    adapter: HubAdapter,
    file: HubFile,
    handle: BufferedWriter,
    token: str | None,
    endpoint: str | None,
    what: str,
    on_bytes: OnBytes,
    num_before: int,
) -> None:
    url = hf_hub_url(adapter.repo, file.name, revision=adapter.commit, endpoint=endpoint)
    headers = build_hf_headers(token=token or False) | {"Accept-Encoding": "identity"}
    num_vain_tries = 0
    if handle.tell() > file.num_bytes:
        handle.truncate(0)
    while (start := handle.seek(0, os.SEEK_END)) < file.num_bytes:
        cause = "the connection was closed"
        with hub_errors(what, hint="the access has ended", endpoint=endpoint):
            try:
                _stream(url, headers, handle, start, file.num_bytes, lambda done: on_bytes(num_before + done))
            except HfHubHTTPError:
                raise
            except HubConnectionError as error:
                cause = f"{type(error).__name__}: {error}"
        handle.flush()
        num_vain_tries = 0 if handle.tell() > start else num_vain_tries + 1
        if num_vain_tries == MAX_VAIN_TRIES:
            raise SourceUnavailable(
                f"the download of '{file.name}' of {what} was cut at {start} of {file.num_bytes} bytes ({cause});"
                " the next try goes on from there"
            )


def _stream(
    url: str, headers: dict[str, str], handle: BufferedWriter, start: int, num_bytes: int, on_bytes: OnBytes
) -> None:
    if start:
        headers = headers | {"Range": f"bytes={start}-"}
    # The client drops the token where the hub sends it on to another host.
    with get_session().stream("GET", url, headers=headers, timeout=ANSWER_TIMEOUT_S, follow_redirects=True) as response:
        hf_raise_for_status(response)
        if start and response.status_code != 206:
            handle.truncate(0)  # it sends all of it again
            start = 0
        for piece in response.iter_raw():
            # Never more than was announced, whoever sends it.
            handle.write(piece[: num_bytes - start])
            start += len(piece)
            on_bytes(min(start, num_bytes))
            if start >= num_bytes:
                return


def _check_content(file: HubFile, part: Path, what: str) -> None:
    if file.sha256 is None:
        return
    hasher = hashlib.sha256()
    with part.open("rb") as content:
        while chunk := content.read(HASH_CHUNK_BYTES):
            hasher.update(chunk)
    if hasher.hexdigest() != file.sha256:
        part.unlink()
        raise SourceUnavailable(f"'{file.name}' of {what} arrived damaged and was thrown away; try again")
