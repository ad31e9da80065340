"""From the name of a model or an adapter to files on this machine; the only place that knows the hub."""

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.errors import HTTPError as HubConnectionError  # type: ignore[attr-defined]  # of its HTTP client
from tqdm.auto import tqdm

MAX_ADAPTER_ID_CHARACTERS = 512

# What is read of a repository. Pickles are never fetched: opening one can run code.
TEXT_PATTERNS = ("*.json", "*.jinja", "tokenizer.model", "*.tiktoken", "merges.txt", "vocab.txt")
WEIGHT_PATTERNS = ("*.safetensors",)
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
# In place of the second, in adapters of older tools; opened only where the operator trusts them.
PICKLE_FILE = "adapter_model.bin"
# With these a folder that holds no adapter can be told: it is a full model, or the adapter is in a sub-folder.
ADAPTER_HINT_FILES = ("config.json", "*/adapter_config.json")
# Sub-folders of a model repository hold other forms of the same weights, and so does Mistral's consolidated file.
IGNORED_MODEL_PATTERNS = ("*/*", "consolidated*")

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(?:/[A-Za-z0-9][\w.-]*)?", re.ASCII)


class SourceError(Exception):
    """A model's or an adapter's files cannot be had; the message names what, why and the fix, in one line."""


class SourceFormatError(SourceError):
    """The name itself cannot be understood."""


class SourceNotFound(SourceError):
    """There is no such folder, repository or revision."""


class SourceForbidden(SourceError):
    """The hub refuses access."""


class SourceUnavailable(SourceError):
    """The hub cannot be reached or is in trouble, or the disk refuses; a later try may work."""


@dataclass(frozen=True, slots=True)
class LocalSource:
    """Files on this machine: a folder, where it came from (local or hub), and the hub's commit."""

    path: str
    source: str
    revision: str | None


@dataclass(frozen=True, slots=True)
class AdapterItem:
    """One item of the list of adapters: the name that clients use, and where the files are."""

    adapter_id: str
    location: str
    revision: str | None
    is_local: bool


class _NoProgress(tqdm):  # type: ignore[type-arg]
    """Progress bars that are not shown."""

    def __init__(self, *args: Any, **kwargs: Any):
        kwargs.pop("name", None)
        super().__init__(*args, **(kwargs | {"disable": True}))


def adapter_id_problem(adapter_id: str) -> str | None:
    """Why a text cannot be an adapter's id, or None: an id is a name or a hub id, never a way out of a folder."""
    if not adapter_id:
        return "must not be empty"
    if len(adapter_id) > MAX_ADAPTER_ID_CHARACTERS:
        return f"must have at most {MAX_ADAPTER_ID_CHARACTERS} characters. Given: {len(adapter_id)}"
    if not adapter_id.isprintable():
        return "must not contain control characters"
    if any(character in adapter_id for character in "\\%"):
        return "must not contain '\\' or '%'"
    if adapter_id == "-" or adapter_id.startswith("~"):
        return "must not be '-' or start with '~'"
    if any(part in ("", ".", "..") for part in adapter_id.split("/")):
        return "must be a name or a hub id, not a path"
    return None


def _looks_like_path(name: str) -> bool:
    return name.startswith(("/", "./", "../", "~")) or name in (".", "..")


def _split(item: str, separator: str) -> tuple[str, str | None]:
    first, found, second = item.partition(separator)
    first, second = first.strip(), second.strip()
    if not first or (found and not second):
        raise SourceFormatError(f"Invalid LoRA adapter format: {item}")
    return first, second if found else None


def _parse_item(item: str) -> AdapterItem:
    if item.count("=") > 1 or item.count("@") > 1:
        raise SourceFormatError(f"Invalid LoRA adapter format: {item}")
    source, revision = _split(item, "@")
    name, path = _split(source, "=")
    if path is None and (_looks_like_path(name) or os.path.isdir(name)):
        raise SourceFormatError(f"'{name}' is a path: give the adapter a name, as in name={name}")
    if path is None and not _is_adapter_hub_id(name):
        raise SourceFormatError(f"'{name}' is no hub id (org/name); a folder is given as name=path")
    problem = adapter_id_problem(name)
    if problem is not None:
        raise SourceFormatError(f"an adapter's name {problem}: {name!r}")
    return AdapterItem(name, name if path is None else path, revision, is_local=path is not None)


def parse_lora_adapters(text: str) -> list[AdapterItem]:
    """Read a list of adapters as TGI writes it: `id`, `id@revision`, `name=path`, `name=path@revision`, by commas.

    An id may name a sub-folder of its repository (org/name/folder). Raises SourceFormatError, also for a name that
    is given twice.
    """
    items = [_parse_item(item.strip()) for item in text.split(",") if item.strip()]
    names: set[str] = set()
    for item in items:
        if item.adapter_id in names:
            raise SourceFormatError(f"adapter '{item.adapter_id}' is given twice: give each a name of its own")
        names.add(item.adapter_id)
    return items


def read_adapter_list(path: str) -> tuple[list[AdapterItem], list[str]]:
    """The items of a file, one a line, and its lines of JSON, which are merges of adapters.

    Empty lines and those that begin with # are passed over. Raises SourceError.
    """
    try:
        lines = Path(os.path.expanduser(path)).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SourceNotFound(f"the list of adapters '{path}' cannot be read: {error}") from None
    lines = [line.strip() for line in lines if not line.lstrip().startswith("#")]
    items = parse_lora_adapters(",".join(line for line in lines if not line.startswith("{")))
    return items, [line for line in lines if line.startswith("{")]


def _is_adapter_hub_id(name: str) -> bool:
    parts = name.split("/")
    return HUB_ID.fullmatch("/".join(parts[:2])) is not None and adapter_id_problem(name) is None


def _http_status(error: BaseException | None) -> int | None:
    return error.response.status_code if isinstance(error, HfHubHTTPError) else None


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__


def _unavailable(what: str, error: BaseException, endpoint: str | None) -> SourceUnavailable:
    if isinstance(error, LocalEntryNotFoundError) and error.__cause__ is not None:
        error = error.__cause__
    status = _http_status(error)
    cause = f"it answers {status}" if status else f"{type(error).__name__}: {_first_line(error)}"
    where = f"the hub at {endpoint}" if endpoint else "the hub"
    return SourceUnavailable(
        f"{where} cannot give {what}: {cause}. Try again later, or give a local folder; without a network, "
        "download it before and set HF_HUB_OFFLINE=1"
    )


def named_with_revision(repo: str, revision: str | None) -> str:
    """A repository and the revision that was asked for, as messages name them."""
    return f"'{repo}'" if revision is None else f"'{repo}' at revision '{revision}'"


@contextmanager
def hub_errors(what: str, *, hint: str, endpoint: str | None, offline: bool = False) -> Iterator[None]:
    """Turn what the hub's library raises inside the block into SourceErrors; `hint` says what to do about a token."""
    try:
        yield
    except GatedRepoError:
        raise SourceForbidden(f"{what} is gated: accept its terms on the hub; {hint}") from None
    except RepositoryNotFoundError:
        raise SourceNotFound(
            f"no folder and no hub repository {what}: check the spelling; if it is private, {hint}"
        ) from None
    except RevisionNotFoundError:
        raise SourceNotFound(f"the hub has the repository but no {what}: check the revision's spelling") from None
    except HFValidationError:
        raise SourceFormatError(f"{what} is neither a folder nor a hub id (org/name)") from None
    except (OSError, HubConnectionError) as error:
        if _http_status(error) in (401, 403) or _http_status(error.__cause__) in (401, 403):
            raise SourceForbidden(f"the hub refuses access to {what}: {hint}") from None
        if offline:
            raise SourceUnavailable(
                f"{what} is not complete in the cache and the network is switched off (HF_HUB_OFFLINE):"
                " unset it once to download, or give a local folder"
            ) from None
        raise _unavailable(what, error, endpoint) from None


def _download(
    repo: str,
    revision: str | None,
    patterns: Sequence[str],
    ignored: Sequence[str],
    *,
    cache_dir: str | None,
    token: str | None,
    endpoint: str | None,
    offline: bool,
    progress: bool,
) -> LocalSource:
    what = named_with_revision(repo, revision)
    hint = "the token has no access" if token else "give a token with HF_TOKEN"
    with hub_errors(what, hint=hint, endpoint=endpoint, offline=offline):
        path = snapshot_download(
            repo,
            revision=revision,
            cache_dir=cache_dir,
            token=token,
            allow_patterns=list(patterns),
            ignore_patterns=list(ignored),
            endpoint=endpoint,
            local_files_only=offline,
            tqdm_class=None if progress else _NoProgress,
        )
    return LocalSource(path=path, source="hub", revision=os.path.basename(path))


def resolve_model(
    model_id: str,
    revision: str | None = None,
    cache_dir: str | None = None,
    token: str | None = None,
    *,
    endpoint: str | None = None,
    offline: bool = False,
    weights: bool = True,
    progress: bool = True,
) -> LocalSource:
    """The files of a model: a folder as it is, or a hub id (`org/name`, `org/name@revision`) through the hub's cache.

    Without `weights` only configuration and tokenizer are fetched. Raises SourceError.
    """
    folder = os.path.expanduser(model_id)
    if os.path.isdir(folder):
        return LocalSource(path=os.path.realpath(folder), source="local", revision=None)
    repo, separator, named_revision = model_id.partition("@")
    if _looks_like_path(model_id) or repo.count("/") > 1:
        raise SourceNotFound(f"no folder '{model_id}'")
    if separator:
        if revision is not None and revision != named_revision:
            raise SourceFormatError(f"'{model_id}' names a revision, and '{revision}' was given too: leave one out")
        revision = named_revision
    if HUB_ID.fullmatch(repo) is None or revision == "":
        raise SourceFormatError(f"'{model_id}' is neither a folder nor a hub id (org/name, org/name@revision)")
    patterns = [*TEXT_PATTERNS, *(WEIGHT_PATTERNS if weights else ())]
    return _download(
        repo, revision, patterns, IGNORED_MODEL_PATTERNS,
        cache_dir=cache_dir, token=token, endpoint=endpoint, offline=offline, progress=progress,
    )  # fmt: skip


def resolve_adapter(
    item: AdapterItem,
    cache_dir: str | None = None,
    token: str | None = None,
    *,
    endpoint: str | None = None,
    offline: bool = False,
    progress: bool = True,
) -> LocalSource:
    """The files of an adapter: its config and its safetensors weights, nothing else. Raises SourceError."""
    if item.is_local:
        folder = os.path.expanduser(item.location)
        if not os.path.isdir(folder):
            raise SourceNotFound(f"no folder '{item.location}'; a hub id is given without a name")
        return LocalSource(path=os.path.realpath(folder), source="local", revision=None)
    parts = item.location.split("/")
    repo, below = "/".join(parts[:2]), "/".join(parts[2:])
    patterns = [f"{below}/{name}" for name in ADAPTER_FILES] if below else [*ADAPTER_FILES, *ADAPTER_HINT_FILES]
    source = _download(
        repo, item.revision, patterns, (),
        cache_dir=cache_dir, token=token, endpoint=endpoint, offline=offline, progress=progress,
    )  # fmt: skip
    if not below:
        return source
    folder = os.path.join(source.path, below)
    if not os.path.isdir(folder):
        raise SourceNotFound(f"the hub has '{repo}' but no adapter in its folder '{below}'")
    return LocalSource(path=folder, source=source.source, revision=source.revision)
