"""`AdapterManifest`: what an adapter's config and header say, checked against the base model without a tensor read."""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedReader
from math import prod
from pathlib import Path

from loraplex_models.adapters.experts import ExpertEntry
from loraplex_models.adapters.fit import EndEntry as EndEntry
from loraplex_models.adapters.fit import Fit
from loraplex_models.adapters.fit import ModuleEntry as ModuleEntry
from loraplex_models.adapters.lora_config import CONFIG_FILE, parse_lora_config
from loraplex_models.adapters.pages import RankRows
from loraplex_models.adapters.refusal import CONVERT_COMMAND, shown
from loraplex_models.adapters.refusal import ManifestError as ManifestError
from loraplex_models.adapters.tensor_header import TensorEntry, read_tensor_header
from loraplex_models.adapters.tensor_names import EXPERTS, sort_names
from loraplex_models.config import ROUTER, ModelConfig
from loraplex_models.names import served_names

WEIGHTS_FILE = "adapter_model.safetensors"
MAX_CONFIG_BYTES = 2**20
# What trainers save beside an adapter, and what would change the reading of prompts.
UNUSED_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "added_tokens.json",
    "chat_template.jinja",
)
CHUNK_BYTES = 2**20


@dataclass(frozen=True, slots=True)
class AdapterManifest:
    """An adapter's layout, checked. `modules` is keyed by served module name, `layers.0.self_attn.q_proj`.

    `digest` names the bytes of both files, `layout_digest` those that this manifest was read from: the config and
    the header of the weights.
    """

    rank: int  # the largest over the modules; 0 where there is no low-rank product
    alpha: float
    target_modules: tuple[str, ...]  # kinds of modules in the file: q_proj, …
    modules: dict[str, ModuleEntry]
    experts: tuple[ExpertEntry, ...]  # the pairs for experts
    num_experts: int  # of each layer of the base model
    biases: dict[str, str]  # by module: the tensor that replaces the base's bias
    embedding: EndEntry | None
    head: EndEntry | None
    invocation_token_ids: tuple[int, ...]  # activated LoRA: it acts from the start of their last occurrence on
    rank_rows: tuple[RankRows, ...]  # what it takes on a device, for `num_device_bytes`
    dense_elements: int  # likewise
    digest: str
    layout_digest: str
    num_bytes: int  # of the served tensors, as stored
    warnings: list[str]

    @property
    def is_plain(self) -> bool:
        """Whether it is nothing but products B(A x) of the layers' linears."""
        has_parts = any(entry.magnitude_name or entry.b_bias_name for entry in self.modules.values())
        has_ends = self.embedding is not None or self.head is not None
        return not (has_parts or has_ends or self.biases or self.experts or self.invocation_token_ids)


def module_shapes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """Input and output size of each linear of a layer that an adapter may change."""
    if config.linears is not None:
        return {kind: (in_size, out_size) for kind, in_size, out_size in config.linears}
    hidden, intermediate = config.hidden_size, config.intermediate_size
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    attention = {
        "self_attn.q_proj": (hidden, queries),
        "self_attn.k_proj": (hidden, keys),
        "self_attn.v_proj": (hidden, keys),
        "self_attn.o_proj": (queries, hidden),
    }
    if config.has_packed_linears:
        attention = {"self_attn.qkv_proj": (hidden, queries + 2 * keys), "self_attn.o_proj": (queries, hidden)}
    if config.experts is not None:
        attention[ROUTER] = (hidden, config.experts.num_experts)
        if not config.experts.dense_layers:
            return attention
    if not config.has_gated_mlp:
        return attention | {"mlp.c_fc": (hidden, intermediate), "mlp.c_proj": (intermediate, hidden)}
    if config.has_packed_linears:
        packed = {"mlp.gate_up_proj": (hidden, 2 * intermediate), "mlp.down_proj": (intermediate, hidden)}
        return attention | packed
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
            f" convert it with `{CONVERT_COMMAND}`",
            "adapter_unsupported",
        )
    for name in names:
        if name == "adapters.safetensors" or name.endswith((".gguf", ".nemo")):
            kind, fix = {
                "gguf": ("a llama.cpp", "serve the PEFT adapter that it was made from"),
                "nemo": ("a NeMo", "export it in the PEFT format with NeMo's script"),
            }.get(name.rpartition(".")[2], ("an MLX", f"convert it with `{CONVERT_COMMAND}`"))
            return ManifestError(f"{shown(name)} is {kind} adapter: {fix}", "adapter_unsupported")
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


def _unused_files(names: list[str]) -> list[str]:
    unused = [name for name in names if name in UNUSED_FILES]
    if not unused:
        return []
    return [f"{', '.join(unused)} are not used: prompts are read with the base model's tokenizer and chat template"]


def _check_size(manifest_bytes: int, rank: int, max_rank: int, max_bytes: int | None) -> None:
    if rank > max_rank:
        raise ManifestError(
            f"rank {rank} ({manifest_bytes:,} bytes) is greater than max_lora_rank {max_rank}:"
            f" start it with --max-lora-rank {rank}",
            "adapter_too_large",
        )
    if max_bytes is not None and manifest_bytes > max_bytes:
        needed = -(-manifest_bytes // 2**20)
        raise ManifestError(
            f"{manifest_bytes:,} bytes; this server takes adapters up to {max_bytes:,}:"
            f" start it with --max-adapter-mb {needed}",
            "adapter_too_large",
        )


def check_adapter(
    folder: str | Path,
    config: ModelConfig,
    *,
    max_rank: int,
    max_bytes: int | None = None,
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
        has_experts = config.experts is not None
        lora = parse_lora_config(config_bytes, tensors, has_experts=has_experts)
        _check_tensors(tensors)
        fit = Fit(config, module_shapes(config), lora, tensors)
        fit.check_vocabulary()
        kinds = [*module_shapes(config), *([EXPERTS] if has_experts else [])]
        found = sort_names(tensors, kinds, served_names(config.architecture))
        fit.take(found)
        num_bytes = fit.num_bytes()
        _check_size(num_bytes, fit.rank, max_rank, max_bytes)
        hasher = start_digest(config_bytes, header.raw)
        layout_digest = hasher.hexdigest()
        if digest is None:
            while chunk := file.read(CHUNK_BYTES):
                hasher.update(chunk)
            digest = hasher.hexdigest()
    return AdapterManifest(
        rank=fit.rank,
        alpha=lora.alpha,
        target_modules=fit.target_modules(),
        modules=fit.modules,
        experts=tuple(fit.experts),
        num_experts=0 if config.experts is None else config.experts.num_experts,
        biases=fit.biases,
        embedding=fit.ends.get("embed_tokens"),
        head=fit.ends.get("lm_head"),
        invocation_token_ids=lora.features.invocation_token_ids,
        rank_rows=fit.rank_rows(),
        dense_elements=fit.dense_elements(),
        digest=digest,
        layout_digest=layout_digest,
        num_bytes=num_bytes,
        warnings=[*fit.warnings(base_model_name), *found.warnings, *_unused_files(names)],
    )
