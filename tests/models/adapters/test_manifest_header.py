"""Damaged weights files, one by one."""

import json
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from adapter_files import WEIGHTS_FILE, base_config, write_adapter, write_raw_weights
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from loraplex_models.adapters.manifest import ManifestError, check_adapter


def refusal(folder: Path) -> str:
    with pytest.raises(ManifestError) as caught:
        check_adapter(folder, base_config(), max_rank=64)
    assert caught.value.error_type == "adapter_invalid"
    return str(caught.value)


def tensor(start: Any = 0, stop: Any = 8, dtype: Any = "F32", shape: Any = (2,)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_adapter(tmp_path)


@pytest.mark.parametrize("num_bytes", [0, 1, 7])
def test_a_file_shorter_than_its_length_field_is_refused(num_bytes: int, folder: Path) -> None:
    (folder / WEIGHTS_FILE).write_bytes(b"\0" * num_bytes)
    assert f"{num_bytes} bytes" in refusal(folder)


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 8 * 2**20 + 1])
def test_a_header_that_claims_too_much_is_refused_unread(length: int, folder: Path) -> None:
    (folder / WEIGHTS_FILE).write_bytes(struct.pack("<Q", length) + b"{}")
    assert f"claims {length} bytes" in refusal(folder)


def test_a_header_longer_than_the_file_is_refused(folder: Path) -> None:
    (folder / WEIGHTS_FILE).write_bytes(struct.pack("<Q", 1000) + b"{}")
    assert "cut off" in refusal(folder)


def test_a_file_cut_off_in_its_tensors_is_refused(folder: Path) -> None:
    content = (folder / WEIGHTS_FILE).read_bytes()
    (folder / WEIGHTS_FILE).write_bytes(content[:-100])
    assert "cut off" in refusal(folder)


def test_bytes_after_the_last_tensor_are_refused(folder: Path) -> None:
    with (folder / WEIGHTS_FILE).open("ab") as file:
        file.write(b"more")
    assert "last 4 bytes" in refusal(folder)


@pytest.mark.parametrize(
    "header", [b"", b"not json", b"[]", b"7", b"null", b"\xff\xff", b"[" * 50_000, b'{"a":' + b"9" * 5000 + b"}"]
)
def test_a_header_that_is_no_json_object_is_refused(header: bytes, folder: Path) -> None:
    write_raw_weights(folder, header)
    refusal(folder)


@pytest.mark.parametrize(
    ("entry", "word"),
    [
        (tensor(0, 8, "F31"), "unknown dtype 'F31'"), (tensor(0, 8, 32), "unknown dtype 32"),
        (tensor(-8, 0), "data_offsets"), (tensor(8, 0), "hold -8 bytes"), (tensor(0, 2**70), "data_offsets"),
        (tensor(0, 8.0), "data_offsets"), (tensor(0, True), "data_offsets"), (tensor("0", 8), "data_offsets"),
        (tensor(0, 12), "hold 12 bytes"), (tensor(0, 8, shape=[3]), "needs 12"), (tensor(0, 8, shape=[-2]), "shape"),
        (tensor(0, 8, shape=[2.0]), "shape"), (tensor(0, 8, shape="2"), "shape"),
        (tensor(0, 8, shape=[1] * 9), "shape"),
        (tensor(0, 8, shape=[2**62, 2**62]), "needs"), (tensor(80, 88), "cut off"), ([], "not an object"),
        ({"dtype": "F32", "shape": [2]}, "data_offsets"), (tensor(0, 8) | {"data_offsets": [0, 8, 9]}, "data_offsets"),
    ],
)  # fmt: skip
def test_a_broken_entry_is_named(entry: Any, word: str, folder: Path) -> None:
    write_raw_weights(folder, {"some.tensor": entry}, b"\0" * 8)
    message = refusal(folder)
    assert "some.tensor" in message
    assert word in message


def test_overlapping_tensors_are_refused(folder: Path) -> None:
    write_raw_weights(folder, {"a": tensor(0, 8), "b": tensor(4, 12)}, b"\0" * 12)
    assert refusal(folder).startswith("tensor 'b' overlaps 'a'")
    write_raw_weights(folder, {"a": tensor(0, 8), "b": tensor(0, 8)}, b"\0" * 8)
    assert "overlaps" in refusal(folder)


def test_a_hole_between_tensors_is_refused(folder: Path) -> None:
    write_raw_weights(folder, {"a": tensor(0, 8), "b": tensor(12, 20)}, b"\0" * 20)
    assert "4 bytes before tensor 'b'" in refusal(folder)


def test_a_name_given_twice_is_refused(folder: Path) -> None:
    entry = json.dumps(tensor(0, 8))
    write_raw_weights(folder, f'{{"a": {entry}, "a": {entry}}}'.encode(), b"\0" * 8)
    assert "'a' twice" in refusal(folder)


def test_more_tensors_than_an_adapter_can_have_are_refused(folder: Path) -> None:
    header = {f"t{i}": tensor(0, 0, shape=[0]) for i in range(50_001)}
    write_raw_weights(folder, header)
    assert "50001 tensors" in refusal(folder)


def test_a_million_tensors_are_refused_without_reading_them(folder: Path) -> None:
    entry = json.dumps(tensor(0, 0, shape=[0]))
    write_raw_weights(folder, ("{" + ",".join(f'"t{i}":{entry}' for i in range(1_000_000)) + "}").encode())
    tracemalloc.start()
    try:
        message = refusal(folder)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert "claims" in message
    assert peak < 2**20


def test_a_message_never_repeats_a_huge_name(folder: Path) -> None:
    write_raw_weights(folder, {"n" * 1_000_000: tensor(0, 8, "F31")}, b"\0" * 8)
    assert len(refusal(folder)) < 400


def test_a_name_with_control_characters_is_escaped(folder: Path) -> None:
    write_raw_weights(folder, {"a\nb\x1b[31m": tensor(0, 8, "F31")}, b"\0" * 8)
    assert "\n" not in refusal(folder)
    assert "\x1b" not in refusal(folder)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_file_with_any_byte_changed_in_its_header_is_refused_or_read(data: st.DataObject, folder: Path) -> None:
    path = folder / WEIGHTS_FILE
    original = path.read_bytes()
    header_bytes = 8 + int.from_bytes(original[:8], "little")
    damaged = bytearray(original)
    for _ in range(data.draw(st.integers(1, 3))):
        damaged[data.draw(st.integers(0, header_bytes - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(damaged)
    try:
        check_adapter(folder, base_config(), max_rank=64)
    except ManifestError:
        pass
    finally:
        path.write_bytes(original)
