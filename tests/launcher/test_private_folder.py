import tempfile
from pathlib import Path

import pytest

from loraplex.launch_error import LaunchError
from loraplex.private_folder import private_folder


def test_no_place_for_temporary_files_is_said_with_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    with pytest.raises(LaunchError, match=r"--tmpfs /tmp.*TMPDIR"), private_folder():
        pass
