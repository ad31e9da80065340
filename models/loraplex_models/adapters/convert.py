"""Adapters of other forms, written anew as PEFT LoRA: AdaLoRA, MLX, and PEFT files with pickled weights.

All three conversions are exact: scalings become part of B, in float32, and alpha is set to the rank.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from loraplex_models.adapters.lora_config import CONFIG_FILE
from loraplex_models.adapters.manifest import WEIGHTS_FILE, ManifestError
from loraplex_models.adapters.refusal import shown

PICKLE_FILE = "adapter_model.bin"
MLX_FILE = "adapters.safetensors"
ADALORA_TENSOR = re.compile(r"(?P<path>.+)\.lora_(?P<matrix>[ABE])(?:\.[^.]+)?")
MLX_TENSOR = re.compile(r"(?P<path>.+)\.lora_(?P<matrix>[ab])")
PEFT_PREFIX = "base_model.model."

# By module: A [rank, in] and B [out, rank].
Pairs = dict[str, tuple[Tensor, Tensor]]


def convert_adapter(source: str | Path, target: str | Path) -> str:
    """Write the adapter in folder `source` to the new folder `target` as PEFT LoRA; says what was done.

    A pickle is read as data only, no code in it runs. Raises ManifestError for what cannot be converted or read.
    """
    source, target = Path(source), Path(target)
    config = _read_config(source)
    if target.exists():
        raise ManifestError(f"{target} is there already: name a folder that is not")
    if (source / MLX_FILE).is_file():
        return _write(target, config, _mlx_pairs(config, _read_tensors(source / MLX_FILE)), "MLX")
    if (source / WEIGHTS_FILE).is_file():
        tensors = _read_tensors(source / WEIGHTS_FILE)
    elif (source / PICKLE_FILE).is_file():
        tensors = _read_pickle(source / PICKLE_FILE)
    else:
        raise ManifestError(f"{source} has none of {WEIGHTS_FILE}, {PICKLE_FILE} and {MLX_FILE}")
    method = str(config.get("peft_type", "LORA")).upper()
    if method == "ADALORA":
        return _write(target, config, _adalora_pairs(config, tensors), "AdaLoRA")
    if method != "LORA":
        raise ManifestError(
            f"peft_type {method} cannot be converted exactly: use peft.save_as_lora", "adapter_unsupported"
        )
    if (source / WEIGHTS_FILE).is_file():
        raise ManifestError(f"{source} is a PEFT LoRA in {WEIGHTS_FILE} already: there is nothing to convert")
    target.mkdir(parents=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, target / WEIGHTS_FILE)
    (target / CONFIG_FILE).write_text(json.dumps(config, indent=2), encoding="utf-8")
    return f"{len(tensors)} tensors of a pickle written as {WEIGHTS_FILE}"


def _read_config(source: Path) -> dict[str, Any]:
    try:
        config = json.loads((source / CONFIG_FILE).read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ManifestError(f"{source / CONFIG_FILE} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ManifestError(f"{source / CONFIG_FILE} is not JSON ({error})") from None
    if not isinstance(config, dict):
        raise ManifestError(f"{source / CONFIG_FILE} is not a JSON object")
    return config


def _read_tensors(file: Path) -> dict[str, Tensor]:
    try:
        tensors: dict[str, Tensor] = load_file(file)
    except (OSError, SafetensorError) as error:
        raise ManifestError(f"{file} cannot be read: {error}") from None
    return tensors


def _read_pickle(file: Path) -> dict[str, Tensor]:
    try:
        tensors = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a broken pickle can make the reader raise; it is told, not passed over
        raise ManifestError(f"{file} cannot be read as tensors only: {error.__class__.__name__}") from None
    if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise ManifestError(f"{file} holds something else than named tensors")
    # Tensors that share memory would not be written twice.
    return {str(name): tensor.clone() for name, tensor in tensors.items()}


def _matrices(tensors: Mapping[str, Tensor], pattern: re.Pattern[str], wanted: str) -> dict[str, dict[str, Tensor]]:
    modules: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        match = pattern.fullmatch(name)
        if match is None:
            if "ranknum" in name:
                continue
            raise ManifestError(f"tensor {shown(name)} is none of lora_{', lora_'.join(wanted)}: not converted")
        modules.setdefault(match["path"].removeprefix(PEFT_PREFIX), {})[match["matrix"]] = tensor.float()
    for path, found in modules.items():
        if len(found) < len(wanted):
            raise ManifestError(f"{shown(path)} has only lora_{', lora_'.join(sorted(found))}: save the adapter again")
    return modules


def _adalora_pairs(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Pairs:
    """PEFT: x @ (A ⊙ E).T @ B.T · alpha / (init_r + 1e-5); ranks that were cut away may leave a module with none."""
    rank = _number(config, "init_r", 12)
    alpha = _number(config, "lora_alpha", 8)
    scaling = (alpha if alpha > 0 else rank) / (rank + 1e-5)
    modules = _matrices(tensors, ADALORA_TENSOR, "ABE")
    return {
        path: (found["A"] * found["E"].reshape(-1, 1), found["B"] * scaling)
        for path, found in modules.items()
        if len(found["A"])
    }


def _mlx_pairs(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Pairs:
    """MLX: scale · (x @ a) @ b with a [in, rank] and b [rank, out]."""
    kind = config.get("fine_tune_type", "lora")
    if kind != "lora":
        raise ManifestError(
            f"{CONFIG_FILE}: fine_tune_type is {shown(kind)}: only lora is converted", "adapter_unsupported"
        )
    parameters = config.get("lora_parameters")
    if not isinstance(parameters, dict):
        raise ManifestError(f"{CONFIG_FILE} has no lora_parameters: this is not an MLX adapter")
    scale = _number(parameters, "scale", 20.0)
    modules = _matrices(tensors, MLX_TENSOR, "ab")
    return {path: (found["a"].t(), found["b"].t() * scale) for path, found in modules.items()}


def _number(fields: Mapping[str, Any], name: str, default: float) -> float:
    value = fields.get(name, default)
    if type(value) not in (int, float):
        raise ManifestError(f"{CONFIG_FILE}: {name} is {shown(value)}, not a number")
    return float(value)


def _write(target: Path, config: Mapping[str, Any], pairs: Pairs, kind: str) -> str:
    if not pairs:
        raise ManifestError("the adapter has no module with a rank above 0")
    ranks = {path: len(a) for path, (a, _) in pairs.items()}
    rank = max(ranks.values())
    others = {path: own for path, own in ranks.items() if own != rank}
    fields = {
        "peft_type": "LORA",
        "task_type": config.get("task_type", "CAUSAL_LM"),
        "base_model_name_or_path": config.get("base_model_name_or_path", config.get("model")),
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": sorted({path.rpartition(".")[2] for path in pairs}),
        "inference_mode": True,
    }
    tensors: dict[str, Tensor] = {}
    for path, (a, b) in pairs.items():
        tensors[f"{PEFT_PREFIX}{path}.lora_A.weight"] = a.contiguous()
        tensors[f"{PEFT_PREFIX}{path}.lora_B.weight"] = b.contiguous()
    target.mkdir(parents=True)
    save_file(tensors, target / WEIGHTS_FILE)
    (target / CONFIG_FILE).write_text(json.dumps(fields, indent=2), encoding="utf-8")
    return f"{len(pairs)} modules of {kind} written as LoRA of rank {rank}"
