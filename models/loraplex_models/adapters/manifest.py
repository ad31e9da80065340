"""`AdapterManifest`: what an adapter's config and header say, checked against the base model without a tensor read."""

import hashlib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedReader
from math import prod
from pathlib import Path

from loraplex_models.adapters.lora_config import CONFIG_FILE, LoraConfig, parse_lora_config
from loraplex_models.adapters.refusal import ManifestError as ManifestError
from loraplex_models.adapters.refusal import shown, shown_names
from loraplex_models.adapters.tensor_header import TensorEntry, read_tensor_header
from loraplex_models.adapters.tensor_names import LoraPair, sort_names
from loraplex_models.config import ModelConfig

WEIGHTS_FILE = "adapter_model.safetensors"
MAX_CONFIG_BYTES = 2**20
SERVED_DTYPES = {"F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1}  # and the bytes of an element
CHUNK_BYTES = 2**20
# Full matrices of the embeddings, under all their names, and the side of a LoRA pair that is as long as the vocabulary.
VOCABULARY_TENSOR = re.compile(
    r"(^|\.)(embed_tokens|lm_head)\."
    r"((modules_to_save\.|original_module\.|base_layer\.)?((?!lora_)[^.]+\.)?weight$|lora_B|lora_embedding_A)"
)


@dataclass(frozen=True, slots=True)
class ModuleEntry:
    """One adapted linear: y += scaling · B(A x), A [rank, in_features], B [out_features, rank] in the file."""

    a_name: str
    b_name: str
    rank: int
    scaling: float
    in_features: int
    out_features: int
    dtype: str  # of A, as safetensors names it


@dataclass(frozen=True, slots=True)
class AdapterManifest:
    """An adapter's layout, checked. `modules` is keyed by served module name, `layers.0.self_attn.q_proj`.

    `digest` names the bytes of both files, `layout_digest` those that this manifest was read from: the config and
    the header of the weights.
    """

    rank: int  # the largest over the modules
    alpha: float
    target_modules: tuple[str, ...]  # kinds of modules in the file: q_proj, …
    modules: dict[str, ModuleEntry]
    digest: str
    layout_digest: str
    num_bytes: int  # of the served tensors, as stored
    warnings: list[str]


def module_shapes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """Input and output size of each linear of a layer that an adapter may change."""
    hidden, intermediate = config.hidden_size, config.intermediate_size
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    if config.has_packed_linears:
        return {
            "self_attn.qkv_proj": (hidden, queries + 2 * keys),
            "self_attn.o_proj": (queries, hidden),
            "mlp.gate_up_proj": (hidden, 2 * intermediate),
            "mlp.down_proj": (intermediate, hidden),
        }
    attention = {
        "self_attn.q_proj": (hidden, queries),
        "self_attn.k_proj": (hidden, keys),
        "self_attn.v_proj": (hidden, keys),
        "self_attn.o_proj": (queries, hidden),
    }
    if config.experts is not None and not config.experts.dense_layers:
        return attention
    if not config.has_gated_mlp:
        return attention | {"mlp.c_fc": (hidden, intermediate), "mlp.c_proj": (intermediate, hidden)}
    return attention | {
        "mlp.gate_proj": (hidden, intermediate),
        "mlp.up_proj": (hidden, intermediate),
        "mlp.down_proj": (intermediate, hidden),
    }


def _missing_config(folder: Path, names: list[str]) -> ManifestError:
    if "config.json" in names:
        return ManifestError(f"no {CONFIG_FILE} but a config.json: this is a full model, not an adapter")
    below = [name for name in names if (folder / name / CONFIG_FILE).is_file()]
    if len(below) == 1:
        return ManifestError(f"no {CONFIG_FILE} here, but in the sub-folder {shown(below[0])}: name that one")
    return ManifestError(f"no {CONFIG_FILE}: this is not the folder of a PEFT adapter")


def _missing_weights(names: list[str]) -> ManifestError:
    if any(name in names for name in ("adapter_model.bin", "adapter_model.pt")):
        return ManifestError(
            f"only pickled weights (adapter_model.bin), no {WEIGHTS_FILE}: pickles can run code and are not opened;"
            " load the adapter with PEFT and save it again (safe_serialization is the default)",
            "adapter_unsupported",
        )
    for name in names:
        if name == "adapters.safetensors" or name.endswith((".gguf", ".nemo")):
            kind = {"gguf": "a llama.cpp", "nemo": "a NeMo"}.get(name.rpartition(".")[2], "an MLX")
            return ManifestError(
                f"{shown(name)} is {kind} adapter: convert it to the PEFT format", "adapter_unsupported"
            )
    return ManifestError(
        f"no {WEIGHTS_FILE} beside {CONFIG_FILE} (pickled weights are neither fetched nor opened):"
        " load the adapter with PEFT and save it again"
    )


@contextmanager
def open_adapter_file(path: Path) -> Iterator[tuple[BufferedReader, int]]:
    """Open one of an adapter's files for reading, with its size; what is not a plain file is refused."""
    try:
        if not path.is_file():  # before it is opened: a pipe would wait for ever
            raise ManifestError(f"{path.name} is not a file")
        with path.open("rb") as file:
            yield file, os.fstat(file.fileno()).st_size
    except OSError as error:
        raise ManifestError(f"{path.name} cannot be read: {error.strerror}") from None


def read_adapter_config(folder: Path) -> bytes:
    """The bytes of adapter_config.json. Raises ManifestError."""
    with open_adapter_file(folder / CONFIG_FILE) as (file, num_bytes):
        if num_bytes > MAX_CONFIG_BYTES:
            raise ManifestError(f"{CONFIG_FILE} has {num_bytes} bytes, at most {MAX_CONFIG_BYTES} are read")
        return file.read(num_bytes)


def start_digest(config_bytes: bytes, header: bytes) -> "hashlib._Hash":
    """A hash that covers an adapter's config and the header of its weights; the tensors' bytes are to follow."""
    return hashlib.sha256(len(config_bytes).to_bytes(8, "little") + config_bytes + header)


def _check_tensors(tensors: dict[str, TensorEntry]) -> None:
    for name, tensor in tensors.items():
        if prod(tensor.shape) == 0:
            raise ManifestError(
                f"tensor {shown(name)} is empty {list(tensor.shape)}: saved under ZeRO-3 without gathering;"
                " save the adapter again with stage3_gather_16bit_weights_on_model_save"
            )


class _Checker:
    """One adapter against one base model."""

    def __init__(self, config: ModelConfig, lora: LoraConfig, tensors: dict[str, TensorEntry]):
        self._config = config
        self._lora = lora
        self._tensors = tensors
        self._shapes = module_shapes(config)
        self._trained_on = f" (trained on {shown(lora.base_model_name)})" if lora.base_model_name else ""

    def check_names(self, pairs: dict[str, LoraPair], unmatched: list[str]) -> None:
        """Every LoRA tensor must belong to a module of the base, and there must be some."""
        if not pairs:
            expected = [f"base_model.model.model.layers.0.{module}.lora_A.weight" for module in self._shapes]
            seen = f"its tensors are {shown_names(unmatched, 3)}" if unmatched else "it has no tensors"
            raise ManifestError(
                f"no tensor fits the base model: {seen};"
                f" expected names like {shown_names(expected[:3], 3)}{self._trained_on}",
                "adapter_incompatible",
            )
        if unmatched:
            raise ManifestError(
                f"{len(unmatched)} tensors are for modules that the base model does not have:"
                f" {shown_names(unmatched, 10)}{self._trained_on}",
                "adapter_incompatible",
            )

    def check_vocabulary(self) -> None:
        """Tensors of the embeddings are not served, but their size tells another vocabulary."""
        for name, tensor in self._tensors.items():
            if not VOCABULARY_TENSOR.search(name) or len(tensor.shape) != 2:
                continue
            num_tokens = tensor.shape[1] if "lora_embedding_A" in name else tensor.shape[0]
            if num_tokens != self._config.vocab_size:
                raise ManifestError(
                    f"tensor {shown(name)} is for {num_tokens} tokens, the base model's vocabulary has"
                    f" {self._config.vocab_size}: trained with another vocabulary{self._trained_on}",
                    "adapter_incompatible",
                )

    def entry(self, module: str, pair: LoraPair) -> ModuleEntry:
        """Check the two tensors of a module."""
        _, layer, kind = module.split(".", 2)
        if int(layer) >= self._config.num_layers:
            raise ManifestError(
                f"tensor {shown(pair.a_name)} is for layer {layer}, the base model has layers 0 to"
                f" {self._config.num_layers - 1}{self._trained_on}",
                "adapter_incompatible",
            )
        experts = self._config.experts
        if experts is not None and kind.startswith("mlp.") and int(layer) not in experts.dense_layers:
            raise ManifestError(
                f"tensor {shown(pair.a_name)} is for a plain MLP, layer {layer} of the base model has experts"
                f"{self._trained_on}",
                "adapter_incompatible",
            )
        a, b = self._tensors[pair.a_name], self._tensors[pair.b_name]
        for name, tensor in ((pair.a_name, a), (pair.b_name, b)):
            if len(tensor.shape) != 2:
                raise ManifestError(f"tensor {shown(name)} has the shape {list(tensor.shape)}, not two dimensions")
            if tensor.dtype not in SERVED_DTYPES:
                raise ManifestError(
                    f"tensor {shown(name)} has dtype {tensor.dtype}: served are {', '.join(SERVED_DTYPES)};"
                    " save the adapter in one of them",
                    "adapter_unsupported",
                )
        in_features, out_features = self._shapes[kind]
        if a.shape[1] != in_features or b.shape[0] != out_features:
            raise ManifestError(
                f"{module}: expected A [rank, {in_features}] and B [{out_features}, rank],"
                f" found {list(a.shape)} and {list(b.shape)}: trained on a base of another size{self._trained_on}",
                "adapter_incompatible",
            )
        rank = a.shape[0]
        if b.shape[1] != rank:
            raise ManifestError(
                f"{module}: A has rank {rank} and B {b.shape[1]} ({shown(pair.b_name)}): save the adapter again"
            )
        expected_rank = self._lora.module_rank(pair.peft_path)
        if rank != expected_rank:
            raise ManifestError(
                f"{module}: {shown(pair.a_name)} has rank {rank}, {CONFIG_FILE} says {expected_rank}"
                " (r and rank_pattern): config and weights are not of the same adapter"
            )
        scaling = self._lora.module_scaling(pair.peft_path, rank)
        return ModuleEntry(pair.a_name, pair.b_name, rank, scaling, in_features, out_features, a.dtype)

    def warnings(self, pairs: dict[str, LoraPair], base_copies: list[str], base_model_name: str | None) -> list[str]:
        """What a reader should know of an adapter that is served."""
        warnings = list(self._lora.warnings)
        trained_on = self._lora.base_model_name
        if trained_on is None:
            warnings.append(f"{CONFIG_FILE} names no base model; checked by names and shapes only")
        elif base_model_name and _last_part(trained_on) != _last_part(base_model_name):
            warnings.append(f"trained on {shown(trained_on)}, served on {shown(base_model_name)}; the shapes fit")
        if base_copies:
            warnings.append(f"{len(base_copies)} copies of base weights are not used: {shown_names(base_copies, 3)}")
        targets = self._lora.target_modules
        if targets is not None:
            names = tuple(f".{name}" for name in targets)
            extra = [pair.peft_path for pair in pairs.values() if not f".{pair.peft_path}".endswith(names)]
            if extra:
                warnings.append(f"tensors for modules that target_modules does not list: {shown_names(extra, 3)}")
        return warnings


def _last_part(model_name: str) -> str:
    return model_name.rstrip("/").rpartition("/")[2].lower()


def _check_rank(modules: dict[str, ModuleEntry], max_rank: int, num_bytes: int) -> int:
    rank = max(entry.rank for entry in modules.values())
    if rank > max_rank:
        raise ManifestError(
            f"rank {rank} ({num_bytes:,} bytes); this server holds ranks up to {max_rank}:"
            f" start it with --max-lora-rank {rank}",
            "adapter_too_large",
        )
    return rank


def check_adapter(
    folder: str | Path,
    config: ModelConfig,
    *,
    max_rank: int,
    base_model_name: str | None = None,
    digest: str | None = None,
) -> AdapterManifest:
    """Check the adapter in a folder against the base model, without reading a tensor's values.

    With `digest` (known from an earlier check) only config and header are read, and the weights' bytes are not
    hashed: `load_adapter_weights` compares them with it. Raises ManifestError.
    """
    folder = Path(folder)
    try:
        names = sorted(entry.name for entry in os.scandir(folder))
    except OSError as error:
        raise ManifestError(f"the adapter's folder cannot be read: {error.strerror}") from None
    if CONFIG_FILE not in names:
        raise _missing_config(folder, names)
    if WEIGHTS_FILE not in names:
        raise _missing_weights(names)
    config_bytes = read_adapter_config(folder)
    with open_adapter_file(folder / WEIGHTS_FILE) as (file, file_bytes):
        header = read_tensor_header(file, file_bytes)
        tensors = header.tensors
        lora = parse_lora_config(config_bytes, tensors)
        _check_tensors(tensors)
        checker = _Checker(config, lora, tensors)
        checker.check_vocabulary()
        sorted_names = sort_names(tensors, module_shapes(config).keys())
        checker.check_names(sorted_names.pairs, sorted_names.unmatched)
        modules = {module: checker.entry(module, pair) for module, pair in sorted_names.pairs.items()}
        num_bytes = sum(
            tensors[name].stop - tensors[name].start
            for entry in modules.values()
            for name in (entry.a_name, entry.b_name)
        )
        rank = _check_rank(modules, max_rank, num_bytes)
        hasher = start_digest(config_bytes, header.raw)
        layout_digest = hasher.hexdigest()
        if digest is None:
            while chunk := file.read(CHUNK_BYTES):
                hasher.update(chunk)
            digest = hasher.hexdigest()
    return AdapterManifest(
        rank=rank,
        alpha=lora.alpha,
        target_modules=tuple(sorted({module.rpartition(".")[2] for module in modules})),
        modules=modules,
        digest=digest,
        layout_digest=layout_digest,
        num_bytes=num_bytes,
        warnings=[
            *checker.warnings(sorted_names.pairs, sorted_names.base_copies, base_model_name),
            *sorted_names.warnings,
        ],
    )
