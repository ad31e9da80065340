"""`AdapterIntake`: brings an adapter's files to this machine and checks them, in the thread that asks."""

import hmac
import logging
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

from loraplex_models.adapter_roots import folder_below
from loraplex_models.adapters.finite import check_finite
from loraplex_models.adapters.manifest import ManifestError, check_adapter
from loraplex_models.config import ModelConfig, read_config
from loraplex_models.hub_adapters import HubAdapter, download, look_up
from loraplex_models.predibase import adapter_path
from loraplex_models.s3_objects import download as download_object
from loraplex_models.s3_objects import look_up as look_up_object
from loraplex_models.sources import (
    ADAPTER_FILES,
    SourceError,
    SourceNotFound,
    SourceUnavailable,
)
from loraplex_server.adapter_location import AdapterLocation
from loraplex_server.adapter_origin import UPLOAD, AdapterOrigin
from loraplex_server.adapter_spec import adapter_spec
from loraplex_server.adapter_store import MIB, AdapterStore, store_key
from loraplex_server.config import ServeConfig
from loraplex_server.errors import (
    AdapterRefused,
    AdapterUnavailable,
)
from loraplex_server.messages import AdapterSpec
from loraplex_server.pickled_adapters import is_pickled, unpickled
from loraplex_server.source_errors import adapter_error

logger = logging.getLogger("loraplex.api")

PROGRESS_INTERVAL_S = 5.0
# How the store's folders of uploads begin, which can be had from nowhere else.
UPLOAD_PREFIX = "upload-"


@dataclass(frozen=True, slots=True)
class BroughtAdapter:
    """A checked adapter on this machine. `scope` names who may see it; None is everybody."""

    spec: AdapterSpec
    scope: str | None = None


class AdapterIntake:
    """Turns locations and folders into checked adapters. Its methods block and may be called from any thread.

    `let_go` forgets the adapter whose files lie under a store's key, and says whether they may be deleted.
    """

    def __init__(self, config: ServeConfig, store: AdapterStore, let_go: Callable[[str], bool]):
        self._config = config.adapter_sources
        self._store = store
        self._let_go = let_go
        self._model_path = config.engine.model_path
        self._base_model_name = config.api.model_id
        self._max_rank = config.engine.adapters.max_lora_rank
        self._model: ModelConfig | None = None
        self._lock = threading.Lock()
        self._is_prepared = False
        self._is_closed = False
        # Tokens are told apart by a name that says nothing about them, and nothing in another process.
        self._secret = secrets.token_bytes(32)

    def close(self) -> None:
        """End what is on its way."""
        self._is_closed = True

    def scope_of(self, token: str | None) -> str | None:
        """A name for those who hold this token."""
        return None if not token else hmac.digest(self._secret, token.encode(), "sha256").hex()[:16]

    def bring(
        self, name: str, wanted: AdapterLocation | AdapterOrigin, token: str | None, deadline: float
    ) -> BroughtAdapter:
        """Fetch what is not here and check it, until `deadline` (time.monotonic). Raises AdapterError.

        What was served before is taken from the store where it is still there, and must be what it was.
        """
        try:
            with self.disk_errors(name):
                if isinstance(wanted, AdapterOrigin):
                    return self._from_before(name, wanted, deadline)
                location = wanted
                match location.source:
                    case "hub":
                        return self._from_hub(name, location, token, deadline)
                    case "local":
                        return BroughtAdapter(self._from_folder(name, location, deadline))
                    case "s3":
                        return self._from_s3(name, location.place, None, deadline)
                    case "pbase":
                        place = adapter_path(self._config.predibase_gateway, location.place, token)
                        return self._from_s3(name, place, self.scope_of(token), deadline)
        except SourceError as error:
            raise adapter_error(error, f"adapter '{name}': {error}") from None

    def origin_of(self, spec: AdapterSpec, location: AdapterLocation | None, scope: str | None = None) -> AdapterOrigin:
        """Where this content can be had again; `scope`: who may see it, if not everybody."""
        if location is None and spec.source != UPLOAD:
            location = AdapterLocation("local", spec.path, by_operator=True)
        return AdapterOrigin(
            location=location,
            digest=spec.digest,
            revision=spec.revision,
            store_key=self._store.key_of(spec.path) if scope is None else None,
        )

    def begin_upload(self, name: str, num_bytes: int) -> Path:
        """A folder for the files of an upload, with room for `num_bytes`. Raises AdapterError."""
        with self.disk_errors(name):
            self._prepare()
            self._make_room(name, num_bytes)
            return self._store.new_staging()

    def end_upload(self, name: str, staging: Path) -> AdapterSpec:
        """Check what was received and move it to its place. Raises AdapterError."""
        spec = self.check(name, staging, UPLOAD, None, time.monotonic() + self._config.adapter_fetch_timeout)
        with self.disk_errors(name):
            # A folder of its own, also for content that is there already, so that nobody else deletes it.
            key = UPLOAD_PREFIX + store_key(spec.digest, secrets.token_hex(8))
            folder = self._store.keep(staging, key)
        return msgspec.structs.replace(spec, path=str(folder))

    def drop_upload(self, staging: Path) -> None:
        """Delete what is left of an upload in its staging folder."""
        self._store.drop_staging(staging)

    @contextmanager
    def disk_errors(self, name: str) -> Iterator[None]:
        """Turn what the disk raises inside the block into an AdapterError; the log has the folder."""
        try:
            yield
        except OSError as error:
            logger.error("adapter '%s': the disk refuses in %s: %s", name, self._config.adapter_cache, error)
            raise AdapterUnavailable(
                f"adapter '{name}': the server's disk refuses ({error.strerror or 'read or write'})"
            ) from None

    def discard(self, store_key: str) -> None:
        """Delete the files of an upload that nobody uses any more."""
        self._store.remove(store_key)

    def check(self, name: str, folder: Path, source: str, revision: str | None, deadline: float) -> AdapterSpec:
        """The spec of a folder's adapter. Raises AdapterRefused with the finding."""
        try:
            if self._config.trust_pickle_adapters and is_pickled(folder):
                self._prepare()
                folder = unpickled(folder, self._store, deadline - time.monotonic())
            manifest = check_adapter(
                folder,
                self.model_config(),
                max_rank=self._max_rank,
                max_bytes=self._config.max_adapter_mb * MIB,
                base_model_name=self._base_model_name,
            )
            check_finite(folder, lambda: self._keep_going(name, deadline))
        except ManifestError as error:
            raise AdapterRefused(f"adapter '{name}': {error}", error.error_type) from None
        for warning in manifest.warnings:
            logger.warning("adapter '%s': %s", name, warning)
        return adapter_spec(name, str(folder), manifest, source=source, revision=revision)

    # Sources

    def _from_before(self, name: str, origin: AdapterOrigin, deadline: float) -> BroughtAdapter:
        location = origin.location
        folder = self._store.find(origin.store_key) if origin.store_key is not None else None
        brought = None
        if folder is not None:
            try:
                brought = BroughtAdapter(self.check(name, folder, origin.source, origin.revision, deadline))
            except AdapterRefused as error:
                if location is None or error.error_type != "adapter_invalid":
                    raise
        if location is not None and (brought is None or brought.spec.digest != origin.digest):
            if folder is not None:
                logger.warning("adapter '%s': its files in %s are damaged and are fetched again", name, folder)
                self._store.remove(folder.name)
            brought = self.bring(name, replace(location, revision=origin.revision or location.revision), None, deadline)
        if brought is None:
            raise SourceNotFound("its files are gone from this server's disk: upload it again")
        if origin.digest not in (None, brought.spec.digest):
            raise AdapterRefused(
                f"adapter '{name}': its files are not those that it was registered with, they have the digest "
                f"{brought.spec.digest[:12]} and had {str(origin.digest)[:12]}: register it again"
            )
        return brought

    def _from_folder(self, name: str, location: AdapterLocation, deadline: float) -> AdapterSpec:
        if location.by_operator:
            folder = os.path.realpath(os.path.expanduser(location.place))
            if not os.path.isdir(folder):
                logger.warning("adapter '%s': there is no folder %s", name, folder)
                raise SourceNotFound("its folder is gone")
            return self.check(name, Path(folder), "local", None, deadline)
        below = folder_below(self._config.adapter_root, location.place)
        if below is None:
            raise SourceNotFound("there is no such folder below the roots for adapters (--adapter-root)")
        return self.check(name, Path(below), "local", None, deadline)

    def _from_hub(self, name: str, location: AdapterLocation, token: str | None, deadline: float) -> BroughtAdapter:
        if self._config.hub_offline:
            raise SourceUnavailable("it is not here, and the network is switched off (HF_HUB_OFFLINE)")
        shared = self._config.hub_token if location.by_operator or self._config.share_hub_token else None
        parts = location.place.split("/")
        found = look_up(
            "/".join(parts[:2]),
            "/".join(parts[2:]),
            location.revision,
            token=token or shared,
            endpoint=self._config.hub_endpoint,
            token_hint="send a token that has access as `api_token`",
            with_pickles=self._config.trust_pickle_adapters,
        )
        self._check_size(name, found.num_bytes)
        # What the server's own token opens is for everybody: the operator has said so.
        scope = None if found.is_public or not token else self.scope_of(token)
        key = store_key("hub", found.repo, found.folder, found.commit)
        folder = self._stored(key, found, name, token or shared, deadline)
        spec = self.check(name, folder, "hub", found.commit, deadline)
        return BroughtAdapter(_shown_as(spec, scope, key), scope)

    def _from_s3(self, name: str, place: str, scope: str | None, deadline: float) -> BroughtAdapter:
        """`scope`: whose token has told the place; a place that a request names itself is the operator's to allow."""
        bucket, prefix = self._s3_place(place, is_told=scope is not None)
        access = self._config.s3
        found = [one for file in ADAPTER_FILES if (one := look_up_object(access, bucket, f"{prefix}/{file}"))]
        if len(found) < len(ADAPTER_FILES):
            raise SourceNotFound(f"S3 has no {' and '.join(ADAPTER_FILES)} there")
        num_bytes = sum(one.num_bytes for one in found)
        self._check_size(name, num_bytes)

        def bring(staging: Path) -> None:
            self._make_room(name, num_bytes)
            logger.info("adapter '%s': downloading %d bytes from S3", name, num_bytes)
            for one, file in zip(found, ADAPTER_FILES, strict=True):
                part = self._store.parts / store_key(access.address, bucket, one.key, one.etag)
                download_object(access, one, staging / file, part, lambda _: self._keep_going(name, deadline))

        self._prepare()
        key = store_key("s3", access.address, bucket, prefix, *(one.etag for one in found))
        folder = self._store.find(key) or self._store.build(key, bring)
        spec = self.check(name, folder, "s3" if scope is None else "pbase", None, deadline)
        return BroughtAdapter(_shown_as(spec, scope, key), scope)

    def _s3_place(self, place: str, *, is_told: bool) -> tuple[str, str]:
        """The bucket and the prefix that a name means, if adapters may be named there.

        What a gateway has told the holder of a token may lie in the operator's own folder; others cannot name it there.
        """
        place = place.removeprefix("s3://").strip("/")
        own = self._config.s3_folder
        allowed = [root.removeprefix("s3://").strip("/") for root in self._config.adapter_bucket]
        allowed += [own] if own and is_told else []
        for candidate in (place, f"{own}/{place}" if own else place):
            if any(candidate.startswith(f"{root}/") for root in allowed):
                bucket, _, prefix = candidate.partition("/")
                return bucket, prefix
        raise SourceNotFound("it is in no bucket that adapters may be named in (--adapter-bucket)")

    def _stored(self, key: str, found: HubAdapter, name: str, token: str | None, deadline: float) -> Path:
        self._prepare()
        ready = self._store.find(key)
        return ready or self._store.build(key, lambda staging: self._download(found, staging, name, token, deadline))

    def _download(self, found: HubAdapter, staging: Path, name: str, token: str | None, deadline: float) -> None:
        self._make_room(name, found.num_bytes)
        logger.info("adapter '%s': downloading %d bytes at %s", name, found.num_bytes, found.commit)
        next_report = time.monotonic() + PROGRESS_INTERVAL_S

        def on_bytes(done: int) -> None:
            nonlocal next_report
            self._keep_going(name, deadline)
            if time.monotonic() > next_report:
                next_report = time.monotonic() + PROGRESS_INTERVAL_S
                logger.info("adapter '%s': %d of %d bytes are here", name, done, found.num_bytes)

        download(
            found, staging, parts=self._store.parts, token=token, endpoint=self._config.hub_endpoint, on_bytes=on_bytes
        )

    # Limits

    def _check_size(self, name: str, num_bytes: int) -> None:
        if num_bytes > self._config.max_adapter_mb * MIB:
            raise AdapterRefused(
                f"adapter '{name}': its files have {num_bytes} bytes, at most {self._config.max_adapter_mb} MiB are"
                " taken (--max-adapter-mb)",
                "adapter_too_large",
            )

    def _make_room(self, name: str, num_bytes: int) -> None:
        if not self._store.make_room(num_bytes, self._let_go):
            logger.error(
                "adapter '%s': no room for %d bytes in %s: %d bytes are free on the disk, %d MiB allowed"
                " (--adapter-cache-mb)",
                *(name, num_bytes, self._config.adapter_cache, self._store.free_bytes(), self._config.adapter_cache_mb),
            )
            raise AdapterUnavailable(f"adapter '{name}': the server's disk space for adapters is used up")

    def _prepare(self) -> None:
        with self._lock:
            if not self._is_prepared:
                self._store.prepare()
                self._is_prepared = True

    def model_config(self) -> ModelConfig:
        """The base model's, read once; any thread may call it."""
        with self._lock:
            if self._model is None:
                self._model = read_config(self._model_path)
            return self._model

    def _keep_going(self, name: str, deadline: float) -> None:
        if self._is_closed:
            raise AdapterUnavailable("the server is going down")
        if time.monotonic() > deadline:
            raise timed_out(name, self._config.adapter_fetch_timeout)


def _shown_as(spec: AdapterSpec, scope: str | None, key: str) -> AdapterSpec:
    """In what the engine shows, a private adapter has no name."""
    return spec if scope is None else msgspec.structs.replace(spec, adapter_id=f"private-{store_key(scope, key)[:12]}")


def timed_out(name: str, timeout_s: float) -> AdapterUnavailable:
    """The refusal of what took too long."""
    return AdapterUnavailable(
        f"adapter '{name}' was not here within {timeout_s:g} s (--adapter-fetch-timeout);"
        " the next try goes on from there"
    )
