"""The tensors of a safetensors checkpoint, each read once, from memory-mapped shards."""

import json
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


class CheckpointError(ValueError):
    """A checkpoint cannot be served; the message names the file or tensor and the cause."""


class Checkpoint:
    """The open shards of one checkpoint folder: `take` each tensor once, then ask what was `left_over`."""

    def __init__(self, folder: str | Path) -> None:
        """Open the shards and read their headers.

        Raises CheckpointError when a file is missing or broken.
        """
        self._folder = Path(folder)
        self._files: list[Any] = []
        self._file_of: dict[str, tuple[str, Any]] = {}
        self._taken: set[str] = set()
        self.total_bytes = 0
        self.taken_bytes = 0
        try:
            for name in _shard_names(self._folder):
                self._open(name)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def close(self) -> None:
        """Close the shards. Tensors that were taken and not copied stay valid until they are dropped."""
        for file in self._files:
            file.__exit__(None, None, None)
        self._files.clear()

    def take(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Return the tensor of that name, mapped from its file.

        Raises CheckpointError when it is missing, has another shape, or is not of floating point.
        """
        if name not in self._file_of:
            raise CheckpointError(f"the checkpoint in '{self._folder}' has no tensor '{name}'")
        assert name not in self._taken, f"tensor {name} is read twice"
        self._taken.add(name)
        file_name, file = self._file_of[name]
        try:
            tensor: Tensor = file.get_tensor(name)
        except SafetensorError as error:
            raise CheckpointError(f"'{file_name}': tensor '{name}' cannot be read: {error}") from None
        if tuple(tensor.shape) != shape:
            raise CheckpointError(
                f"'{file_name}': tensor '{name}' has shape {list(tensor.shape)}, config.json asks for {list(shape)}"
            )
        if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise CheckpointError(
                f"'{file_name}': tensor '{name}' is of {tensor.dtype}; float32, bfloat16 and float16 are served"
            )
        self.taken_bytes += tensor.nbytes
        return tensor

    def left_over(self) -> list[str]:
        """Return the names of the tensors that nobody took, sorted."""
        return sorted(self._file_of.keys() - self._taken)

    def _open(self, name: str) -> None:
        path = self._folder / name
        try:
            file: Any = safe_open(path, framework="pt")
        except FileNotFoundError:
            raise CheckpointError(f"the checkpoint's file '{path}' does not exist") from None
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"the checkpoint's file '{path}' is broken or incomplete: {error}") from None
        self._files.append(file)
        self.total_bytes += path.stat().st_size
        for tensor_name in file.keys():  # noqa: SIM118 (not a dict)
            if tensor_name in self._file_of:
                raise CheckpointError(
                    f"tensor '{tensor_name}' is both in '{self._file_of[tensor_name][0]}' and '{name}'"
                )
            self._file_of[tensor_name] = (name, file)


def _shard_names(folder: Path) -> list[str]:
    if (folder / INDEX_FILE).exists():
        return _indexed_shards(folder)
    if (folder / SINGLE_FILE).exists():
        return [SINGLE_FILE]
    raise CheckpointError(
        f"no weights in '{folder}': neither '{SINGLE_FILE}' nor '{INDEX_FILE}' is there (only safetensors are served)"
    )


def _indexed_shards(folder: Path) -> list[str]:
    try:
        weight_map = json.loads((folder / INDEX_FILE).read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(weight_map.values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"'{folder / INDEX_FILE}' cannot be read: {error!r}") from None
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise CheckpointError(f"'{folder / INDEX_FILE}' names a shard outside its folder: {name!r}")
    return names
