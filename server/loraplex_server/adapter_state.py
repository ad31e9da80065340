"""`AdapterState`: the names that were registered while serving, kept in a folder for the next start.

    <folder>/lock             held by the one server that uses the folder
    <folder>/names/00 … ff    by the first byte of the name's hash, one line a name: a checksum and the record as JSON

A file is replaced whole, after its successor was written and synced: at whatever point the process is killed, each name
has the record before a change or after it. A line that was damaged costs the names of its own file that have no other
line, and those only until they are registered again.
"""

import fcntl
import hashlib
import os
import threading
import zlib
from pathlib import Path

import msgspec

from loraplex_server.adapter_origin import Origin
from loraplex_server.adapter_store import sync


class KeptVersion(msgspec.Struct, frozen=True, kw_only=True):
    """A version of a name, and where its content is to be had."""

    version: str
    origin: Origin


class KeptName(msgspec.Struct, frozen=True, kw_only=True):
    """All that a name stands for. Without versions: it was deleted, although the start list has it."""

    name: str
    versions: tuple[KeptVersion, ...] = ()
    split: dict[str, float] = {}
    pinned: bool = False


class AdapterStateError(Exception):
    """The folder cannot be used; the message says why and what to do."""


_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(KeptName).decode


class AdapterState:
    """The records of one folder. `open` and `load` come first; `write` may be called from any thread."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._names = folder / "names"
        self._files: dict[str, dict[str, bytes]] = {}  # file → name → line
        self._damaged: dict[str, list[bytes]] = {}  # file → lines that are not as they were written
        self._unreadable: dict[str, OSError] = {}
        self._lock = threading.Lock()
        self._lock_file: int | None = None

    def open(self) -> None:
        """Make the folder and take it for this process. Raises AdapterStateError."""
        try:
            self._names.mkdir(parents=True, exist_ok=True, mode=0o700)
            lock_file = os.open(self._folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise AdapterStateError(f"{self._folder} cannot be used: {error.strerror} (--adapter-state)") from None
        try:
            fcntl.flock(lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(lock_file)
            raise AdapterStateError(
                f"{self._folder} is used by another server: give each its own folder (--adapter-state)"
            ) from None
        self._lock_file = lock_file

    def close(self) -> None:
        """Let others take the folder."""
        if self._lock_file is not None:
            os.close(self._lock_file)
            self._lock_file = None

    def load(self) -> list[KeptName]:
        """Every record that can be read, by name. Raises AdapterStateError when the folder itself cannot be."""
        found: list[KeptName] = []
        try:
            for path in self._names.iterdir():
                if not path.suffix:
                    found += self._load_file(path)
        except OSError as error:
            raise AdapterStateError(f"{self._names} cannot be read: {error.strerror} (--adapter-state)") from None
        return sorted(found, key=lambda kept: kept.name)

    def problems(self) -> list[str]:
        """What could not be read, for the log."""
        return [
            *(f"{self._names / file}: {len(lines)} records are damaged" for file, lines in self._damaged.items()),
            *(f"{self._names / file} cannot be read: {error.strerror}" for file, error in self._unreadable.items()),
        ]

    def problem_of(self, name: str) -> str | None:
        """Why a name that has no record may have had one."""
        file = _file_of(name)
        if name in self._files.get(file, {}) or not (file in self._damaged or file in self._unreadable):
            return None
        return f"adapter '{name}' is not known, or its record on the server's disk is damaged: register it again"

    def write(self, name: str, kept: KeptName | None) -> None:
        """Put a record in the place of the one that a name has, or remove it; safe from a crash once this returns.

        Raises OSError; then nothing has changed.
        """
        file = _file_of(name)
        with self._lock:
            if file in self._unreadable:
                raise self._unreadable[file]  # what others are registered as stands there
            lines = dict(self._files.get(file, {}))
            lines.pop(name, None)
            if kept is not None:
                lines[name] = _line(_encode(kept))
            # What cannot be read is kept for whoever can repair it, and so that its names do not become unknown ones.
            _replace(self._names / file, b"".join([*lines.values(), *self._damaged.get(file, ())]))
            self._files[file] = lines

    def _load_file(self, path: Path) -> list[KeptName]:
        found = []
        lines = self._files[path.name] = {}
        try:
            content = path.read_bytes()
        except OSError as error:
            self._unreadable[path.name] = error
            return []
        for line in content.splitlines(keepends=True):
            kept = _parse(line)
            if kept is None or _file_of(kept.name) != path.name:
                self._damaged.setdefault(path.name, []).append(line.rstrip(b"\n") + b"\n")
                continue
            lines[kept.name] = line
            found.append(kept)
        return found


def _file_of(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()[:2]


def _line(record: bytes) -> bytes:
    return b"%08x %b\n" % (zlib.crc32(record), record)


def _parse(line: bytes) -> KeptName | None:
    """The record of a line, or None for one that is not as it was written."""
    checksum, _, record = line.partition(b" ")
    record = record.removesuffix(b"\n")
    if _line(record) != line or checksum == b"":
        return None
    try:
        return _decode(record)
    except msgspec.DecodeError:  # written by another release
        return None


def _replace(path: Path, content: bytes) -> None:
    """Put a file in its place whole, safe from a crash once this returns."""
    successor = path.with_suffix(".new")
    file = os.open(successor, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        view = memoryview(content)
        while view:
            view = view[os.write(file, view) :]
        os.fsync(file)
    finally:
        os.close(file)
    os.replace(successor, path)
    sync(path.parent)
