"""`AdapterStore`: the folder on disk that downloaded and uploaded adapters lie in, within a budget.

    <root>/complete/<key>/      an adapter's files, whole; the folder appears by one rename
    <root>/staging/<pid>-<n>/   what is being put together
    <root>/parts/<key>          files whose download was cut

Several servers may share a root: what is complete never changes, and staging folders have their process's number.
"""

import contextlib
import hashlib
import itertools
import logging
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

MIB = 2**20

logger = logging.getLogger("loraplex.api")


@dataclass(frozen=True, slots=True)
class StoredAdapter:
    """A complete adapter: its folder's name, bytes on disk, and when it was last asked for."""

    key: str
    num_bytes: int
    last_used: float


def store_key(*identity: str) -> str:
    """The folder name of what `identity` names."""
    return hashlib.sha256("\n".join(identity).encode()).hexdigest()[:40]


def sync(path: Path) -> None:
    """Have the content of a file, or the entries of a folder, survive a crash of the machine."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class AdapterStore:
    """Complete folders by key. Every method may be called from any thread; none is for the event loop."""

    def __init__(self, root: Path, budget_bytes: int, *, is_durable: bool = False):
        """With `is_durable` a folder that is complete survives a crash of the machine."""
        self._is_durable = is_durable
        self._complete, self._staging, self.parts = root / "complete", root / "staging", root / "parts"
        self._budget_bytes = budget_bytes
        self._numbers = itertools.count()
        self._lock = threading.Lock()
        self._building: dict[str, threading.Lock] = {}

    def prepare(self) -> None:
        """Make the folders, and remove what processes that are gone have left half done. Raises OSError."""
        for folder in (self._complete, self._staging, self.parts):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        for left in self._staging.iterdir():
            pid = left.name.partition("-")[0]
            if not (pid.isdecimal() and psutil.pid_exists(int(pid))):
                shutil.rmtree(left, ignore_errors=True)

    def find(self, key: str) -> Path | None:
        """The complete folder of a key; looking makes it the last used."""
        folder = self._complete / key
        try:
            os.utime(folder)
        except OSError:
            return None
        return folder

    def build(self, key: str, fill: Callable[[Path], None]) -> Path:
        """The complete folder of a key, filled by `fill` if it is not there; one thread fills, the others wait.

        Nothing is left of a folder that `fill` could not complete.
        """
        with self._one_at_a_time(key):
            found = self.find(key)
            if found is not None:
                return found
            with self.staging() as staging:
                fill(staging)
                return self.keep(staging, key)

    @contextmanager
    def staging(self) -> Iterator[Path]:
        """A new folder to put an adapter together in; it is gone after the block, whatever happens."""
        folder = self.new_staging()
        try:
            yield folder
        finally:
            self.drop_staging(folder)

    def new_staging(self) -> Path:
        """A new folder to put an adapter together in; whoever asks for it drops it."""
        folder = self._staging / f"{os.getpid()}-{next(self._numbers)}"
        folder.mkdir(parents=True, mode=0o700)
        return folder

    def drop_staging(self, folder: Path) -> None:
        """Delete a staging folder; nothing happens if it was kept."""
        shutil.rmtree(folder, ignore_errors=True)

    def keep(self, staging: Path, key: str) -> Path:
        """Move a staging folder to its place; where the same is there already, that one stays."""
        if self._is_durable:
            for file in staging.iterdir():
                sync(file)
            sync(staging)
        folder = self._complete / key
        self._complete.mkdir(parents=True, exist_ok=True)
        try:
            os.rename(staging, folder)
        except OSError:
            if not folder.is_dir():
                raise
        os.utime(folder)
        if self._is_durable:
            sync(self._complete)
        return folder

    def key_of(self, folder: str) -> str | None:
        """The key of a complete folder of this store; None for any other."""
        parent, key = os.path.split(folder)
        return key if parent == str(self._complete) else None

    def keys_with(self, prefix: str) -> list[str]:
        """Those of the complete folders that begin so."""
        return [key for key in os.listdir(self._complete) if key.startswith(prefix)] if self._complete.is_dir() else []

    def remove(self, key: str) -> None:
        """Delete a complete folder."""
        # Out of sight first, so that nobody finds half of it.
        gone = self._staging / f"{os.getpid()}-{next(self._numbers)}"
        try:
            self._staging.mkdir(exist_ok=True, mode=0o700)
            os.rename(self._complete / key, gone)
        except OSError:
            return
        shutil.rmtree(gone, ignore_errors=True)

    def make_room(self, num_bytes: int, let_go: Callable[[str], bool]) -> bool:
        """Delete the longest unused folders until `num_bytes` more fit; False if those that are needed take it all.

        `let_go` says of a key whether it may go, and sees to it that nobody asks for it any more. Both the budget
        and the disk's free space count.
        """
        with self._lock:
            stored = self.list()
            used = sum(one.num_bytes for one in stored) + self._parts_bytes()
            for one in sorted(stored, key=lambda one: one.last_used):
                if self._fits(used, num_bytes):
                    break
                if let_go(one.key):
                    logger.info("adapter files %s removed from disk: %d bytes for others", one.key, one.num_bytes)
                    self.remove(one.key)
                    used -= one.num_bytes
            return self._fits(used, num_bytes)

    def list(self) -> list[StoredAdapter]:
        """All complete folders."""
        found = []
        for folder in self._complete.iterdir() if self._complete.is_dir() else ():
            with contextlib.suppress(OSError):  # removed meanwhile
                num_bytes = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
                found.append(StoredAdapter(folder.name, num_bytes, folder.stat().st_mtime))
        return found

    def free_bytes(self) -> int:
        """What the disk has left."""
        return shutil.disk_usage(self._complete).free

    def _fits(self, used: int, num_bytes: int) -> bool:
        return used + num_bytes <= self._budget_bytes and num_bytes <= self.free_bytes()

    def _parts_bytes(self) -> int:
        return sum(file.stat().st_size for file in self.parts.iterdir()) if self.parts.is_dir() else 0

    @contextmanager
    def _one_at_a_time(self, key: str) -> Iterator[None]:
        with self._lock:
            lock = self._building.setdefault(key, threading.Lock())
        with lock:
            yield
        with self._lock:
            if not lock.locked():
                self._building.pop(key, None)
