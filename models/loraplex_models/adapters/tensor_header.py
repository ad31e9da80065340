"""The header of a safetensors file, read with limits and checked, so that a broken file does no harm."""

import json
from dataclasses import dataclass
from io import BufferedReader
from math import prod
from typing import Any

from loraplex_models.adapters.refusal import ManifestError, shown

MAX_HEADER_BYTES = 8 * 2**20
MAX_TENSORS = 50_000
MAX_DIMENSIONS = 8
LENGTH_BYTES = 8

# Bits of an element, for every dtype the format knows.
DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
    "I64": 64, "U64": 64, "F64": 64, "C64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where a tensor lies: `start` and `stop` are bytes from the beginning of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class TensorHeader:
    """What a file's header says, checked; `raw` are the bytes it was read from, the length in front."""

    tensors: dict[str, TensorEntry]
    raw: bytes


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value: dict[str, Any] = {}
    for name, item in pairs:
        if name in value:
            raise ManifestError(f"the safetensors header has {shown(name)} twice: save the file again")
        value[name] = item
    return value


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _entry(name: str, value: Any, data_start: int) -> TensorEntry:
    if not isinstance(value, dict):
        raise ManifestError(f"the safetensors header's entry of tensor {shown(name)} is not an object")
    dtype, shape, offsets = value.get("dtype"), value.get("shape"), value.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise ManifestError(f"tensor {shown(name)} has the unknown dtype {shown(dtype)}")
    if not isinstance(shape, list) or len(shape) > MAX_DIMENSIONS or not all(_is_count(size) for size in shape):
        raise ManifestError(f"tensor {shown(name)} has the shape {shown(shape)}: not a list of a few counts")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_count(offset) for offset in offsets):
        raise ManifestError(f"tensor {shown(name)} has the data_offsets {shown(offsets)}, which are not two counts")
    num_bits = prod(shape) * DTYPE_BITS[dtype]
    start, stop = offsets
    if num_bits != (stop - start) * 8:
        raise ManifestError(
            f"tensor {shown(name)}: data_offsets {offsets} hold {stop - start} bytes,"
            f" its shape {shown(shape)} in {dtype} needs {num_bits / 8:g}"
        )
    return TensorEntry(dtype, tuple(shape), data_start + start, data_start + stop)


def _check_layout(tensors: dict[str, TensorEntry], data_start: int, file_bytes: int) -> None:
    """The tensors must fill the file from the header to its end, side by side."""
    expected, before = data_start, "the header"
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].stop)):
        if tensor.stop > file_bytes:
            raise ManifestError(
                f"tensor {shown(name)} ends at byte {tensor.stop}, the file has {file_bytes}: it was cut off;"
                " download or save it again"
            )
        if tensor.start < expected:
            raise ManifestError(f"tensor {shown(name)} overlaps {before} in the file: save it again")
        if tensor.start > expected:
            raise ManifestError(f"{tensor.start - expected} bytes before tensor {shown(name)} belong to no tensor")
        expected, before = tensor.stop, shown(name)
    if expected != file_bytes:
        raise ManifestError(f"the last {file_bytes - expected} bytes of the weights file belong to no tensor")


def read_tensor_header(file: BufferedReader, file_bytes: int) -> TensorHeader:
    """Read and check the header at the beginning of a safetensors file of `file_bytes` bytes.

    Raises ManifestError (adapter_invalid).
    """
    prefix = file.read(LENGTH_BYTES)
    if len(prefix) < LENGTH_BYTES:
        raise ManifestError(f"the weights file has {len(prefix)} bytes and no safetensors header: save it again")
    length = int.from_bytes(prefix, "little")
    if length > MAX_HEADER_BYTES:
        raise ManifestError(
            f"the weights file's header claims {length} bytes, an adapter's has at most {MAX_HEADER_BYTES}:"
            " this is not a safetensors file of an adapter"
        )
    raw = file.read(length)
    if len(raw) < length:
        raise ManifestError(
            f"the weights file's header claims {length} bytes, the file has {len(raw)}: it was cut off;"
            " download or save it again"
        )
    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError):
        raise ManifestError("the weights file's header is not JSON: this is not a safetensors file") from None
    if not isinstance(value, dict):
        raise ManifestError("the weights file's header is not a JSON object: this is not a safetensors file")
    value.pop("__metadata__", None)
    if len(value) > MAX_TENSORS:
        raise ManifestError(f"the weights file has {len(value)} tensors, an adapter has at most {MAX_TENSORS}")
    data_start = LENGTH_BYTES + length
    tensors = {name: _entry(name, entry, data_start) for name, entry in value.items()}
    _check_layout(tensors, data_start, file_bytes)
    return TensorHeader(tensors, prefix + raw)
