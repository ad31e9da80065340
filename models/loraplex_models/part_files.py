"""Files that collect what arrives of a download, kept when it is cut, so that the next try goes on from there."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedWriter
from pathlib import Path


@contextmanager
def held_part(path: Path) -> Iterator[tuple[Path, BufferedWriter]]:
    """The part file, open behind what has arrived, for this process alone.

    While another process holds it, a file of this process's own takes its place, which is gone after the block. The
    hold ends with the process: there are no stale locks.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            own = path.with_name(f"{path.name}.{os.getpid()}")
            with own.open("wb") as own_handle:
                try:
                    yield own, own_handle
                finally:
                    own.unlink(missing_ok=True)
            return
        yield path, handle
