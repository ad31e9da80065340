"""From a `LoRARequest` to a checked adapter on this machine, for `LLM`."""

import logging
import os
from pathlib import Path
from typing import Any

from loraplex.lora_request import LoRARequest
from loraplex_models.adapters.manifest import ManifestError, check_adapter
from loraplex_models.config import ModelConfig
from loraplex_models.sources import (
    ADAPTER_FILES,
    HUB_ID,
    AdapterItem,
    LocalSource,
    SourceError,
    resolve_adapter,
)
from loraplex_server.adapter_spec import adapter_spec
from loraplex_server.errors import AdapterNotFound, AdapterRefused
from loraplex_server.messages import AdapterSpec
from loraplex_server.source_errors import adapter_error

logger = logging.getLogger(__name__)

# A file's number, size and time of change: while they are the same, so is its content.
Stamp = tuple[tuple[int, int, int], ...]


class OfflineAdapters:
    """Finds and checks adapters; what was checked is not checked again until its files change."""

    def __init__(
        self,
        model: ModelConfig,
        *,
        max_rank: int,
        base_model_name: str | None,
        hub_access: dict[str, Any],
    ):
        self._model = model
        self._max_rank = max_rank
        self._base_model_name = base_model_name
        self._hub_access = hub_access
        self._hub_sources: dict[str, LocalSource] = {}
        self._checked: dict[str, tuple[Stamp, AdapterSpec]] = {}

    def resolve(self, request: LoRARequest) -> AdapterSpec:
        """The adapter of a request. Raises AdapterError with the reason."""
        source = self._source(request)
        stamp = _stamp(Path(source.path))
        checked = self._checked.get(source.path)
        if checked is not None and checked[0] == stamp and checked[1].adapter_id == request.lora_name:
            return checked[1]
        try:
            manifest = check_adapter(
                source.path,
                self._model,
                max_rank=self._max_rank,
                base_model_name=self._base_model_name,
            )
        except ManifestError as error:
            raise AdapterRefused(f"adapter '{request.lora_name}': {error}", error.error_type) from None
        for warning in manifest.warnings:
            logger.warning("adapter '%s': %s", request.lora_name, warning)
        spec = adapter_spec(request.lora_name, source.path, manifest, source=source.source, revision=source.revision)
        self._checked[source.path] = (stamp, spec)
        return spec

    def _source(self, request: LoRARequest) -> LocalSource:
        path = request.lora_path
        if path in self._hub_sources:
            return self._hub_sources[path]
        is_folder = os.path.isdir(os.path.expanduser(path))
        location, _, revision = (path, "", "") if is_folder else path.partition("@")
        repo = "/".join(location.split("/")[:2])
        if not is_folder and not ("/" in repo and HUB_ID.fullmatch(repo)):
            raise AdapterNotFound(
                f"adapter '{request.lora_name}': '{path}' is neither a folder nor a hub id (org/name)"
            )
        item = AdapterItem(request.lora_name, location, revision or None, is_local=is_folder)
        try:
            source = resolve_adapter(item, **self._hub_access)
        except SourceError as error:
            raise adapter_error(error, f"adapter '{request.lora_name}': {error}") from None
        if not is_folder:
            self._hub_sources[path] = source
        return source


def _stamp(folder: Path) -> Stamp:
    stamps = []
    for name in ADAPTER_FILES:
        try:
            found = (folder / name).stat()
        except OSError:  # the check tells what is missing
            continue
        stamps.append((found.st_ino, found.st_size, found.st_mtime_ns))
    return tuple(stamps)
