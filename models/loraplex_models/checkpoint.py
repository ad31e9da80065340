"""The tensors of a safetensors checkpoint, each read once: from memory-mapped shards, or by a stream to a GPU."""

import ctypes
import json
import os
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from loraplex_models.cuts import Cut, CutError, LinearCut, RankPart
from loraplex_models.streamed_tensors import StreamedTensors
from loraplex_models.weight_stream import WeightStream
from loraplex_quant.grouped import GroupedWeight, take_runs
from loraplex_quant.method import FLOATS, LinearWeight, QuantFormatError, WeightFormat

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
# What AutoGPTQ calls its file: gptq_model-4bit-32g.safetensors.
GPTQ_NAME = "gptq_model-*bit-*g"


# The GNU C library keeps freed memory in pieces, a good part of a model's size over the loading of all its layers.
_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)


class CheckpointError(ValueError):
    """A checkpoint cannot be served; the message names the file or tensor and the cause."""


class Checkpoint:
    """The open shards of one checkpoint folder: `take` each tensor once, then ask what was `left_over`.

    `weight_format` reads the linears that are quantised; None where all are plain. With `part`, linears are given as
    that rank holds them. Tensors are asked for by the names that `served_name` gives them; see `served_names`.
    """

    def __init__(
        self,
        folder: str | Path,
        weight_format: WeightFormat | None = None,
        part: RankPart | None = None,
        served_name: Callable[[str], str] = str,
        stream: WeightStream | None = None,
    ) -> None:
        """Open the shards and read their headers. With a `stream`, tensors of floats are given on its device.

        Raises CheckpointError when a file is missing or broken.
        """
        self.weight_format = weight_format
        self.part = part
        self._served_name = served_name
        self._folder = Path(folder)
        self._files: dict[str, Any] = {}  # those that are mapped now
        self._place_of: dict[str, tuple[str, str]] = {}  # by served name: the file, and the name in it
        self._taken: set[str] = set()
        self.total_bytes = 0
        self.taken_bytes = 0
        self.num_quantized = 0  # linears that were stored in the format
        self._streamed = None if stream is None else StreamedTensors(stream, reads_ahead=part is None or part.size == 1)
        try:
            for name in _shard_names(self._folder):
                self._open(name)
                if self._streamed is not None:
                    self._streamed.add(self._folder / name)
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
        return name in self._place_of

    def close(self) -> None:
        """Close the shards. Tensors that were taken and not copied stay valid until they are dropped."""
        self.release()
        if self._streamed is not None:
            self._streamed.close()

    def release(self) -> None:
        """Give back the memory that reading took: a file is mapped anew when the next tensor is taken from it.

        Tensors that were taken and not copied stay valid, and keep their file's memory until they are dropped.
        """
        for file in self._files.values():
            file.__exit__(None, None, None)
        self._files.clear()
        if _trim is not None:
            _trim(0)

    def take(
        self,
        name: str,
        shape: tuple[int, ...] | None,
        dtypes: tuple[torch.dtype, ...] = FLOATS,
        rows: Cut | None = None,
    ) -> Tensor:
        """Return the tensor of that name, mapped from its file or on the stream's device; with `rows`, only those.

        Raises CheckpointError when it is missing, has another shape than the one given, or none of the dtypes.
        """
        if name not in self._place_of:
            raise CheckpointError(f"the checkpoint in '{self._folder}' has no tensor '{name}'")
        assert name not in self._taken, f"tensor {name} is read twice"
        self._taken.add(name)
        file_name, stored_name = self._place_of[name]
        stored = None if self._streamed is None else self._streamed.find(self._folder / file_name, stored_name)
        tensor = self._mapped(file_name, stored_name) if stored is None else None
        found = stored if tensor is None else tensor
        assert found is not None
        if shape is not None and tuple(found.shape) != shape:
            raise CheckpointError(
                f"'{file_name}': tensor '{name}' has shape {list(found.shape)}, config.json asks for {list(shape)}"
            )
        if found.dtype not in dtypes:
            served = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            raise CheckpointError(f"'{file_name}': tensor '{name}' is of {found.dtype}; served here: {served}")
        self.taken_bytes += found.nbytes
        if tensor is not None:
            return tensor if rows is None else take_runs(tensor, 0, rows.runs)
        assert self._streamed is not None and stored is not None
        try:
            return self._streamed.take(stored, None if rows is None else rows.runs)
        except (OSError, EOFError) as error:
            raise CheckpointError(f"'{file_name}': tensor '{name}' cannot be read: {error}") from None

    def left_over(self) -> list[str]:
        """Return the names of the tensors that nobody took, sorted."""
        return sorted(self._place_of.keys() - self._taken)

    def linear(self, module: str) -> "CheckpointLinear":
        """Return the tensors of one linear, by suffix. Raises CheckpointError when it cannot be cut for the rank."""
        try:
            cut = None if self.part is None else self.part.linear(module)
        except CutError as error:
            raise CheckpointError(str(error)) from None
        return CheckpointLinear(self, module) if cut is None else CutLinear(self, module, cut)

    def _open(self, name: str) -> None:
        self._map(name)
        self.total_bytes += (self._folder / name).stat().st_size
        for tensor_name in self._files[name].keys():  # noqa: SIM118 (not a dict)
            served_name = self._served_name(tensor_name)
            if served_name in self._place_of:
                raise CheckpointError(
                    f"tensor '{tensor_name}' is both in '{self._place_of[served_name][0]}' and '{name}'"
                )
            self._place_of[served_name] = (name, tensor_name)

    def _mapped(self, file_name: str, stored_name: str) -> Tensor:
        if file_name not in self._files:
            self._map(file_name)
        try:
            tensor: Tensor = self._files[file_name].get_tensor(stored_name)
        except SafetensorError as error:
            raise CheckpointError(f"'{file_name}': tensor '{stored_name}' cannot be read: {error}") from None
        return tensor

    def _map(self, name: str) -> None:
        path = self._folder / name
        try:
            self._files[name] = safe_open(path, framework="pt")
        except FileNotFoundError:
            # safetensors says the same of a file that it may not open.
            problem = f"may not be read by user {os.getuid()}" if path.exists() else "does not exist"
            raise CheckpointError(f"the checkpoint's file '{path}' {problem}") from None
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"the checkpoint's file '{path}' is broken or incomplete: {error}") from None


class CheckpointLinear:
    """The tensors named `<module>.<suffix>` of a checkpoint. See `StoredLinear`."""

    def __init__(self, checkpoint: Checkpoint, module: str) -> None:
        self._checkpoint = checkpoint
        self._module = module

    def __contains__(self, suffix: str) -> bool:
        return f"{self._module}.{suffix}" in self._checkpoint

    def take(
        self,
        suffix: str,
        shape: tuple[int, ...] | None,
        dtypes: tuple[torch.dtype, ...] = FLOATS,
        rows: Cut | None = None,
    ) -> Tensor:
        """Return one of the tensors, or some rows of it. Raises CheckpointError."""
        return self._checkpoint.take(f"{self._module}.{suffix}", shape, dtypes, rows)

    def read(self, in_size: int, out_size: int, has_bias: bool) -> LinearWeight:
        """Return the weight [out_size, in_size] and the bias. A plain weight may lie in the file's memory.

        Beside a quantised weight a bias may stand that the config does not name. Raises CheckpointError.
        """
        if self._is_plain:
            weight = self.take("weight", (out_size, in_size))
            return LinearWeight(weight, self.take("bias", (out_size,)) if has_bias else None)
        return self._read_quantized(in_size, out_size, has_bias)

    @property
    def _is_plain(self) -> bool:
        weight_format = self._checkpoint.weight_format
        return weight_format is None or not weight_format.is_quantized(self)

    def _read_quantized(self, in_size: int, out_size: int, has_bias: bool) -> LinearWeight:
        weight_format = self._checkpoint.weight_format
        assert weight_format is not None
        self._checkpoint.num_quantized += 1
        try:
            quantized = weight_format.read(self, in_size, out_size)
        except QuantFormatError as error:
            raise CheckpointError(f"'{self._module}': {error}") from None
        bias = self.take("bias", (out_size,)) if has_bias or "bias" in self else None
        # AutoGPTQ writes a bias of zeros for every linear that has none.
        return LinearWeight(quantized, bias if has_bias or bias is None or bool(bias.any()) else None)


class CutLinear(CheckpointLinear):
    """The same for a linear of which the rank holds a part."""

    def __init__(self, checkpoint: Checkpoint, module: str, cut: LinearCut) -> None:
        super().__init__(checkpoint, module)
        self._cut = cut

    def read(self, in_size: int, out_size: int, has_bias: bool) -> LinearWeight:
        """Return the rank's part of weight and bias, whose sizes are given; of a plain weight nothing else is read.

        Raises CheckpointError.
        """
        outputs, inputs = self._cut.outputs, self._cut.inputs
        assert outputs is None or outputs.part_size == out_size
        assert inputs is None or inputs.part_size == in_size
        whole_in = in_size if inputs is None else inputs.size
        whole_out = out_size if outputs is None else outputs.size
        if self._is_plain:
            rows = self.take("weight", (whole_out, whole_in), rows=outputs)
            bias = self.take("bias", (whole_out,), rows=outputs) if has_bias else None
            return LinearWeight(take_part(rows, None, inputs), self._own_bias(bias))
        whole = self._read_quantized(whole_in, whole_out, has_bias)
        if isinstance(whole.weight, GroupedWeight):
            runs = (None if cut is None else cut.runs for cut in (outputs, inputs))
            weight: Tensor | GroupedWeight = whole.weight.part(*runs)
        else:
            weight = take_part(whole.weight, outputs, inputs)
        return LinearWeight(weight, self._own_bias(None if whole.bias is None else take_part(whole.bias, outputs)))

    def _own_bias(self, bias: Tensor | None) -> Tensor | None:
        return bias.contiguous() if bias is not None and self._cut.has_bias else None


def take_part(tensor: Tensor, *cuts: Cut | None) -> Tensor:
    """Return a rank's part of a tensor, given the cut of each dimension, None for all of it; it is dense."""
    for dim, cut in enumerate(cuts):
        if cut is not None:
            tensor = take_runs(tensor, dim, cut.runs)
    return tensor.contiguous()


def _shard_names(folder: Path) -> list[str]:
    for index in (INDEX_FILE, *_names(folder, f"{GPTQ_NAME}.safetensors.index.json")):
        if (folder / index).exists():
            return _indexed_shards(folder / index)
    for single in (SINGLE_FILE, *_names(folder, f"{GPTQ_NAME}.safetensors")):
        if (folder / single).exists():
            return [single]
    raise CheckpointError(
        f"no weights in '{folder}': none of '{SINGLE_FILE}', '{INDEX_FILE}' and '{GPTQ_NAME}.safetensors' is there "
        "(only safetensors are served)"
    )


def _names(folder: Path, pattern: str) -> list[str]:
    return sorted(path.name for path in folder.glob(pattern))


def _indexed_shards(index: Path) -> list[str]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(weight_map.values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"'{index}' cannot be read: {error!r}") from None
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise CheckpointError(f"'{index}' names a shard outside its folder: {name!r}")
    return names
