"""`AdapterWeights`: an adapter's tensors in memory, under the served names and with the scaling in B."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from loraplex_models.adapters.experts import ExpertEntry
from loraplex_models.adapters.manifest import (
    WEIGHTS_FILE,
    AdapterManifest,
    EndEntry,
    ManifestError,
    ModuleEntry,
    open_adapter_file,
    read_adapter_config,
    start_digest,
)
from loraplex_models.adapters.refusal import shown
from loraplex_models.adapters.tensor_header import read_tensor_header
from loraplex_models.layers.expert_lora import PLACES, ExpertPairs

TORCH_DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


@dataclass(frozen=True, slots=True)
class ModuleParts:
    """What a module has beside A and B, float32 [out]: DoRA's lengths, the bias of B (scaled), the base's new bias."""

    magnitude: torch.Tensor | None = None
    b_bias: torch.Tensor | None = None
    bias: torch.Tensor | None = None

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """Those that are there."""
        return tuple(tensor for tensor in (self.magnitude, self.b_bias, self.bias) if tensor is not None)


@dataclass(frozen=True, slots=True)
class EndParts:
    """What an adapter does to embed_tokens or lm_head. See `EndEntry`; `pair` is A [rank, in] and B [out, rank].

    `weight` [vocab, hidden] and `rows` [n, hidden], of the tokens `row_ids` (int64, ascending), are of the model's
    dtype; `base_copy` [vocab, hidden] is float32.
    """

    pair: tuple[torch.Tensor, torch.Tensor] | None
    weight: torch.Tensor | None
    row_ids: torch.Tensor | None
    rows: torch.Tensor | None
    base_copy: torch.Tensor | None
    parts: ModuleParts

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """Those that are there, but for the copy of the base's."""
        own = (self.weight, self.row_ids, self.rows, *(self.pair or ()))
        return (*(tensor for tensor in own if tensor is not None), *self.parts.tensors)


@dataclass(frozen=True, slots=True)
class AdapterWeights:
    """What an adapter adds: module name → A [rank, in] and B [out, rank], so that y += B(A x). On the CPU.

    B is stored rank by rank, as the slots want it: `b.t()` is contiguous. `parts` and `ends` are empty for plain
    adapters.
    """

    digest: str
    rank: int  # the largest over the modules
    modules: dict[str, tuple[torch.Tensor, torch.Tensor]]
    parts: dict[str, ModuleParts] = field(default_factory=dict)  # by module
    ends: dict[str, EndParts] = field(default_factory=dict)  # by embed_tokens or lm_head
    experts: ExpertPairs = field(default_factory=dict)
    # What the ranks of one model have added up of their parts of the base, float32: of modules and ends whose rows no
    # rank has whole, or not all, the squares of W + BA by row; also the bias of the head (`finish.HEAD_BIAS`).
    sums: Mapping[str, torch.Tensor] = field(default_factory=dict)

    @property
    def num_bytes(self) -> int:
        """Memory of all tensors."""
        pairs = sum(tensor.nbytes for pair in self.modules.values() for tensor in pair)
        pairs += sum(tensor.nbytes for pair in self.experts.values() for tensor in pair)
        parts = sum(tensor.nbytes for part in self.parts.values() for tensor in part.tensors)
        sums = sum(tensor.nbytes for tensor in self.sums.values())
        return pairs + parts + sums + sum(tensor.nbytes for end in self.ends.values() for tensor in end.tensors)

    @property
    def device_bytes(self) -> int | None:
        """What it will take on the device, where more than its header is needed to tell."""
        return None


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
        tensor = self.read_unchecked(name)
        if not _is_finite(tensor):
            raise ManifestError(f"tensor {shown(name)} has values that are not finite (NaN or infinity)")
        return tensor

    def read_unchecked(self, name: str) -> torch.Tensor:
        """A tensor in float32, in memory of its own; what is not finite in it stays so in all that is made of it."""
        entry = self._header.tensors[name]
        # A copy: the format does not promise that a tensor is aligned in the file.
        content = self._data[entry.start - self._offset : entry.stop - self._offset]
        return torch.frombuffer(content, dtype=TORCH_DTYPES[entry.dtype]).reshape(entry.shape).float()


def _is_finite(tensor: torch.Tensor) -> bool:
    """As `isfinite().all()`, in half its time for small tensors: NaN and infinity less themselves are NaN."""
    return not (tensor - tensor).any()


def _load_product(file: _WeightsFile, entry: ModuleEntry, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    a = _dense(file.read_unchecked(entry.a_name), entry.a_blocks)
    b = _dense(file.read_unchecked(entry.b_name), entry.b_blocks).mul(entry.scaling)
    pair = a.to(dtype).contiguous(), b.to(dtype).t().contiguous().t()
    for name, tensor in zip((entry.a_name, entry.b_name), pair, strict=True):
        if not _is_finite(tensor):
            file.read(name)  # raises when the file itself has such values
            raise ManifestError(f"tensor {shown(name)} with its scaling {entry.scaling:g} does not fit into {dtype}")
    return pair


def _dense(matrix: torch.Tensor, num_blocks: int) -> torch.Tensor:
    """The block-diagonal matrix whose blocks are stored one below the other."""
    return matrix if num_blocks == 1 else torch.block_diag(*matrix.chunk(num_blocks))  # type: ignore[no-untyped-call]


def _load_parts(file: _WeightsFile, entry: ModuleEntry | None, bias_name: str | None) -> ModuleParts:
    magnitude = b_bias = None
    if entry is not None:
        magnitude = None if entry.magnitude_name is None else file.read(entry.magnitude_name)
        b_bias = None if entry.b_bias_name is None else file.read(entry.b_bias_name).mul_(entry.scaling)
    return ModuleParts(magnitude, b_bias, None if bias_name is None else file.read(bias_name))


def _load_end(file: _WeightsFile, entry: EndEntry, dtype: torch.dtype) -> EndParts:
    pair = None if entry.product is None else _load_product(file, entry.product, dtype)
    weight = None if entry.weight_name is None else file.read(entry.weight_name).to(dtype)
    row_ids = rows = None
    if entry.rows_name is not None:
        row_ids, order = torch.tensor(entry.row_ids).sort()
        rows = file.read(entry.rows_name).to(dtype)[order].contiguous()
    base_copy = None if entry.base_copy_name is None else file.read(entry.base_copy_name)
    return EndParts(pair, weight, row_ids, rows, base_copy, _load_parts(file, entry.product, None))


def _load_experts(file: _WeightsFile, entry: ExpertEntry, num_experts: int, dtype: torch.dtype) -> ExpertPairs:
    """The pairs of an entry by expert, and gate and up by themselves; they share an A that is common."""
    a, b = file.read(entry.a_name), file.read(entry.b_name).mul_(entry.scaling)
    if entry.expert is None:
        all_a, all_b = a.view(num_experts, entry.rank, -1), b.view(len(b), entry.rank, num_experts).permute(2, 0, 1)
        pairs = [(expert, all_a[expert], all_b[expert]) for expert in range(num_experts)]
    else:
        pairs = [(entry.expert, a, b)]
    names = ("gate", "up") if entry.place == "gate_up" else (entry.place,)
    found: ExpertPairs = {}
    for expert, own_a, own_b in pairs:
        shared_a = own_a.to(dtype).contiguous()
        for name, part_b in zip(names, own_b.chunk(len(names)), strict=True):
            linear, part = PLACES[name]
            found[entry.layer, linear, part, expert] = shared_a, part_b.to(dtype).t().contiguous().t()
    if not all(bool(tensor.isfinite().all()) for pair in found.values() for tensor in pair):
        raise ManifestError(f"tensor {shown(entry.a_name)} or its B with its scaling does not fit into {dtype}")
    return found


def load_adapter_weights(folder: str | Path, manifest: AdapterManifest, *, dtype: torch.dtype) -> AdapterWeights:
    """Read the tensors that a manifest names, scaling folded into B (in float32, then cast to `dtype`).

    The bytes that are used are the bytes that are hashed: they must have the manifest's digest. Raises ManifestError.
    """
    file = _WeightsFile(Path(folder), manifest)
    modules = {name: _load_product(file, entry, dtype) for name, entry in manifest.modules.items()}
    parts = {
        name: _load_parts(file, entry, manifest.biases.get(name))
        for name in {**manifest.modules, **manifest.biases}
        if (entry := manifest.modules.get(name)) is None
        or entry.magnitude_name
        or entry.b_bias_name
        or name in manifest.biases
    }
    ends = {
        name: _load_end(file, entry, dtype)
        for name, entry in (("embed_tokens", manifest.embedding), ("lm_head", manifest.head))
        if entry is not None
    }
    experts: ExpertPairs = {}
    for pair in manifest.experts:
        experts |= _load_experts(file, pair, manifest.num_experts, dtype)
    return AdapterWeights(manifest.digest, manifest.rank, modules, parts, ends, experts)
