"""The folder in which the processes of one server find each other."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from loraplex.launch_error import LaunchError

# A Unix socket's path holds 107 bytes, and the names of the sockets come after the folder's.
MAX_FOLDER_LENGTH = 90


@contextmanager
def private_folder() -> Iterator[Path]:
    """A folder that nobody else can enter (mode 0700), for as long as the block lasts. Raises LaunchError."""
    try:
        folder = tempfile.mkdtemp(prefix="loraplex-")
    except OSError as error:
        raise LaunchError(
            f"no folder for the sockets between the processes: {error.strerror}: make /tmp writable (in a container "
            "--tmpfs /tmp), or name a folder in TMPDIR"
        ) from None
    if len(os.fsencode(folder)) > MAX_FOLDER_LENGTH:
        os.rmdir(folder)
        folder = tempfile.mkdtemp(prefix="loraplex-", dir="/tmp")
    try:
        yield Path(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
