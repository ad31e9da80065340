"""Which bytes of which shard a tensor is, read by a `WeightStream` ahead of those who ask for it."""

import json
import re
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from loraplex_models.weight_stream import Arriving, WeightStream

# What is on its way before anyone asks: enough that the disk is never idle, little beside a layer's own size.
AHEAD_BYTES = 512 << 20
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of a shard; `start` is its first byte in the file."""

    path: Path
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def nbytes(self) -> int:
        """Its size."""
        return prod(self.shape) * self.dtype.itemsize


class StreamedTensors:
    """The float tensors of shards, each to be taken once."""

    def __init__(self, stream: WeightStream, *, reads_ahead: bool) -> None:
        """`reads_ahead`: whole tensors will be asked for, layer by layer."""
        self._stream = stream
        self._reads_ahead = reads_ahead
        self._found: dict[tuple[Path, str], StoredTensor] = {}
        self._queue: deque[StoredTensor] | None = None  # to be read ahead, in the order in which they may be wanted
        self._started: set[StoredTensor] = set()
        self._ahead: dict[StoredTensor, Arriving] = {}
        self._ahead_bytes = 0

    def add(self, path: Path) -> None:
        """Note a shard's tensors; safetensors has read and checked its header before."""
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        for name, entry in header.items():
            if name != "__metadata__" and entry["dtype"] in DTYPES:
                start = 8 + length + entry["data_offsets"][0]
                stored = StoredTensor(path, name, DTYPES[entry["dtype"]], tuple(entry["shape"]), start)
                self._found[path, name] = stored

    def find(self, path: Path, name: str) -> StoredTensor | None:
        """Where a tensor is; None for one that is not of floats."""
        return self._found.get((path, name))

    def take(self, stored: StoredTensor, runs: Sequence[tuple[int, int]] | None) -> Tensor:
        """Return a tensor on the device, or some runs of its rows one below the other.

        Raises OSError and EOFError.
        """
        arriving = self._ahead.pop(stored, None)
        if arriving is None:
            arriving = self._stream.start(stored.path, _ranges(stored, runs))
        else:
            self._ahead_bytes -= stored.nbytes
        if self._reads_ahead:
            self._read_ahead(stored)
        shape = stored.shape if runs is None else (sum(stop - start for start, stop in runs), *stored.shape[1:])
        return self._stream.take(arriving).view(stored.dtype).view(shape)

    def close(self) -> None:
        """Give up on what nobody took."""
        for arriving in self._ahead.values():
            self._stream.drop(arriving)
        self._ahead.clear()
        self._stream.close()

    def _read_ahead(self, taken: StoredTensor) -> None:
        if self._queue is None:
            # Models are filled layer by layer; what belongs to no layer is large, or wanted at the very end.
            numbered = [stored for stored in self._found.values() if _numbers(stored.name)]
            self._queue = deque(sorted(numbered, key=lambda stored: (_numbers(stored.name), stored.name)))
        self._started.add(taken)
        while self._queue and self._ahead_bytes < AHEAD_BYTES:
            stored = self._queue.popleft()
            if stored not in self._started:
                self._started.add(stored)
                self._ahead[stored] = self._stream.start(stored.path, _ranges(stored, None))
                self._ahead_bytes += stored.nbytes


def _numbers(name: str) -> list[int]:
    return [int(digits) for digits in re.findall(r"(?<=\.)\d+(?=\.)", name)]


def _ranges(stored: StoredTensor, runs: Sequence[tuple[int, int]] | None) -> list[tuple[int, int]]:
    if runs is None:
        return [(stored.start, stored.start + stored.nbytes)]
    row_bytes = prod(stored.shape[1:]) * stored.dtype.itemsize
    return [(stored.start + start * row_bytes, stored.start + stop * row_bytes) for start, stop in runs]
