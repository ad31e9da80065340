"""`AdapterWeights`: an adapter's tensors in memory, under the served names and with the scaling in B."""

from dataclasses import dataclass
from pathlib import Path

import torch

from loraplex_models.adapters.manifest import (
    WEIGHTS_FILE,
    AdapterManifest,
    ManifestError,
    ModuleEntry,
    open_adapter_file,
    read_adapter_config,
    start_digest,
)
from loraplex_models.adapters.refusal import shown
from loraplex_models.adapters.tensor_header import read_tensor_header

TORCH_DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


@dataclass(frozen=True, slots=True)
class AdapterWeights:
    """What an adapter adds: module name → A [rank, in] and B [out, rank], so that y += B(A x). On the CPU.

    B is stored rank by rank, as the slots want it: `b.t()` is contiguous.
    """

    digest: str
    rank: int  # the largest over the modules
    modules: dict[str, tuple[torch.Tensor, torch.Tensor]]

    @property
    def num_bytes(self) -> int:
        """Memory of all tensors."""
        return sum(tensor.nbytes for pair in self.modules.values() for tensor in pair)


class _WeightsFile:
    """The bytes of a weights file, read once, and the tensors in them."""

    def __init__(self, folder: Path, manifest: AdapterManifest):
        config_bytes = read_adapter_config(folder)
        with open_adapter_file(folder / WEIGHTS_FILE) as (file, file_bytes):
            self._header = read_tensor_header(file, file_bytes)
            self._offset = len(self._header.raw)
            self._data = bytearray(file_bytes - self._offset)
            num_read = file.readinto(self._data)
        hasher = start_digest(config_bytes, self._header.raw)
        is_same_layout = hasher.hexdigest() == manifest.layout_digest
        hasher.update(self._data)
        if num_read != len(self._data) or not is_same_layout or hasher.hexdigest() != manifest.digest:
            raise ManifestError("the adapter's files changed since they were checked: load the adapter again")

    def read(self, name: str) -> torch.Tensor:
        """A tensor in float32, finite, in memory of its own."""
        entry = self._header.tensors[name]
        # A copy: the format does not promise that a tensor is aligned in the file.
        content = self._data[entry.start - self._offset : entry.stop - self._offset]
        tensor = torch.frombuffer(content, dtype=TORCH_DTYPES[entry.dtype]).reshape(entry.shape).float()
        if not torch.isfinite(tensor).all():
            raise ManifestError(f"tensor {shown(name)} has values that are not finite (NaN or infinity)")
        return tensor


def _load_module(file: _WeightsFile, entry: ModuleEntry, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    a = file.read(entry.a_name)
    b = file.read(entry.b_name).mul(entry.scaling)
    pair = a.to(dtype).contiguous(), b.to(dtype).t().contiguous().t()
    for name, tensor in zip((entry.a_name, entry.b_name), pair, strict=True):
        if not torch.isfinite(tensor).all():
            raise ManifestError(f"tensor {shown(name)} with its scaling {entry.scaling:g} does not fit into {dtype}")
    return pair


def load_adapter_weights(folder: str | Path, manifest: AdapterManifest, *, dtype: torch.dtype) -> AdapterWeights:
    """Read the tensors that a manifest names, scaling folded into B (in float32, then cast to `dtype`).

    The bytes that are used are the bytes that are hashed: they must have the manifest's digest. Raises ManifestError.
    """
    file = _WeightsFile(Path(folder), manifest)
    modules = {name: _load_module(file, entry, dtype) for name, entry in manifest.modules.items()}
    return AdapterWeights(manifest.digest, manifest.rank, modules)
