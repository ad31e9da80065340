"""Folders of adapters on this machine, below the roots that the operator has named and nowhere else."""

import os
from collections.abc import Sequence

from loraplex_models.sources import ADAPTER_FILES, PICKLE_FILE


def folder_below(roots: Sequence[str], name: str) -> str | None:
    """The real path of the folder `name`, absolute or relative to a root, if it lies below one of the roots.

    None for what is not there and for what lies outside, also by a symbolic link of the folder or of a file in it; the
    answer does not tell them apart, and nothing outside is opened.
    """
    real_roots = [os.path.realpath(os.path.expanduser(root)) for root in roots]
    for root in real_roots:
        folder = os.path.realpath(os.path.join(root, name))
        files = [os.path.realpath(os.path.join(folder, file)) for file in (*ADAPTER_FILES, PICKLE_FILE)]
        if not all(any(_is_below(root, path) for root in real_roots) for path in (folder, *files)):
            continue
        if os.path.isdir(folder):
            return folder
    return None


def _is_below(root: str, path: str) -> bool:
    return path.startswith(root.rstrip(os.sep) + os.sep)
