"""S3: signatures against Amazon's own example, and downloads from a stand-in that checks what it is sent."""

from datetime import UTC, datetime
from pathlib import Path

import pytest
from s3_stand_in import Bucket, running_s3

from loraplex_models.s3_access import S3Access
from loraplex_models.s3_objects import download, look_up, signature_headers
from loraplex_models.sources import SourceForbidden, SourceUnavailable

CONTENT = bytes(range(256)) * 40


def test_a_signature_is_the_one_of_amazons_example() -> None:
    # From «Signature Calculations for the Authorization Header», GET Object.
    access = S3Access(access_key="AKIAIOSFODNN7EXAMPLE", secret_key="wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY")
    headers = signature_headers(
        access,
        "GET",
        "https://examplebucket.s3.amazonaws.com/test.txt",
        {"Range": "bytes=0-9"},
        datetime(2013, 5, 24, tzinfo=UTC),
    )
    assert headers["authorization"].endswith(
        "SignedHeaders=host;range;x-amz-content-sha256;x-amz-date,"
        "Signature=f0e8bdb87c964420e857bd35b5d6ed310bd44f0170aba48dd91039c6036bdb41"
    )


def test_an_object_is_found_and_brought(tmp_path: Path) -> None:
    bucket = Bucket({"/models/legal/adapter_config.json": CONTENT})
    with running_s3(bucket) as access:
        found = look_up(access, "models", "legal/adapter_config.json")
        assert found is not None and found.num_bytes == len(CONTENT)
        seen: list[int] = []
        download(access, found, tmp_path / "file", tmp_path / "part", seen.append)
        assert (tmp_path / "file").read_bytes() == CONTENT and seen[-1] == len(CONTENT)
        assert look_up(access, "models", "legal/nothing") is None


def test_a_download_that_is_cut_goes_on_next_time(tmp_path: Path) -> None:
    bucket = Bucket({"/models/legal/adapter_config.json": CONTENT})
    bucket.cut_at = 3000
    with running_s3(bucket) as access:
        found = look_up(access, "models", "legal/adapter_config.json")
        assert found is not None
        with pytest.raises(SourceUnavailable, match="cut at 3000 of 10240 bytes"):
            download(access, found, tmp_path / "file", tmp_path / "part", lambda done: None)
        assert not (tmp_path / "file").exists()
        bucket.cut_at = None
        download(access, found, tmp_path / "file", tmp_path / "part", lambda done: None)
    assert bucket.asked[-1][1] == "bytes=3000-"
    assert (tmp_path / "file").read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("status", "error"), [(403, SourceForbidden), (500, SourceUnavailable), (503, SourceUnavailable)]
)
def test_refusals_and_trouble_are_told_apart(status: int, error: type[Exception]) -> None:
    bucket = Bucket({"/models/legal/adapter_config.json": CONTENT})
    bucket.status = status
    with running_s3(bucket) as access, pytest.raises(error):
        look_up(access, "models", "legal/adapter_config.json")


def test_a_server_that_is_not_there_is_unavailable() -> None:
    with pytest.raises(SourceUnavailable):
        look_up(S3Access(endpoint="http://127.0.0.1:9"), "models", "x")


def test_secrets_are_not_shown() -> None:
    assert "hush" not in repr(S3Access(secret_key="hush", session_token="hush"))
