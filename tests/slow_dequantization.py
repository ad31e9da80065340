"""Quantised linears taken apart one number at a time, from the formats' descriptions: what readers must equal."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

FIXTURES = Path(__file__).parent / "fixtures" / "quant"
LINEARS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
# Of eight neighbouring outputs, the one that each four bits of a word of AWQ's gemm layout hold.
AWQ_COLUMNS = (0, 2, 4, 6, 1, 3, 5, 7)


def checkpoint_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a fixture."""
    (file,) = folder.glob("*.safetensors")
    return load_file(file)


def linear_tensors(tensors: Mapping[str, Tensor], module: str) -> dict[str, Tensor]:
    """The tensors of one linear, by suffix."""
    return {name[len(module) + 1 :]: t for name, t in tensors.items() if name.startswith(f"{module}.")}


def quantization_of(folder: Path) -> dict[str, Any]:
    """The quantization_config of a fixture."""
    config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return config["quantization_config"]


def slow_weight(config: Mapping[str, Any], linear: Mapping[str, Tensor]) -> Tensor:
    """The weight [out, in] of one linear."""
    weight = {
        "gptq": _gptq,
        "awq": _awq,
        "compressed-tensors": _compressed_tensors,
        "bitsandbytes": _bitsandbytes,
    }[config["quant_method"]](config, linear)
    return torch.tensor(weight, dtype=torch.float64)


def _number(word: int, place: int, bits: int) -> int:
    return (word >> (place * bits)) & (2**bits - 1)


def _gptq(config: Mapping[str, Any], linear: Mapping[str, Tensor]) -> list[list[float]]:
    bits = config["bits"]
    per_word = 32 // bits
    words, zero_words, scales = (linear[name].tolist() for name in ("qweight", "qzeros", "scales"))
    added = 0 if config.get("checkpoint_format") == "gptq_v2" else 1
    weight = []
    for out in range(len(scales[0])):
        row = []
        for i, group in enumerate(linear["g_idx"].tolist()):
            zero = (_number(zero_words[group][out // per_word], out % per_word, bits) + added) % 2**bits
            row.append((_number(words[i // per_word][out], i % per_word, bits) - zero) * scales[group][out])
        weight.append(row)
    return weight


def _awq(config: Mapping[str, Any], linear: Mapping[str, Tensor]) -> list[list[float]]:
    words, zero_words, scales = (linear[name].tolist() for name in ("qweight", "qzeros", "scales"))
    size = config["group_size"]
    if config["version"] == "gemv":
        return [
            [
                (_number(word, j, 4) - _number(zero_words[out][g // 8], g % 8, 4)) * scales[out][g]
                for w, word in enumerate(words[out])
                for j in range(8)
                for g in [(8 * w + j) // size]
            ]
            for out in range(len(words))
        ]
    weight = [[0.0] * len(words) for _ in range(8 * len(words[0]))]
    for i, row in enumerate(words):
        for w, word in enumerate(row):
            for place, column in enumerate(AWQ_COLUMNS):
                zero = _number(zero_words[i // size][w], place, 4)
                weight[8 * w + column][i] = (_number(word, place, 4) - zero) * scales[i // size][8 * w + column]
    return weight


def _compressed_tensors(config: Mapping[str, Any], linear: Mapping[str, Tensor]) -> list[list[float]]:
    bits = config["config_groups"]["group_0"]["weights"]["num_bits"]
    per_word, offset = 32 // bits, 2 ** (bits - 1)
    out_size, in_size = linear["weight_shape"].tolist()
    words, scales = linear["weight_packed"].tolist(), linear["weight_scale"].tolist()
    zero_words = linear["weight_zero_point"].tolist() if "weight_zero_point" in linear else None
    groups = [i * len(scales[0]) // in_size for i in range(in_size)]
    if "weight_g_idx" in linear:
        groups = linear["weight_g_idx"].tolist()
    weight = []
    for out in range(out_size):
        row = []
        for i, g in enumerate(groups):
            signed = _number(words[out][i // per_word], i % per_word, bits) - offset
            zero = _number(zero_words[out // per_word][g], out % per_word, bits) - offset if zero_words else 0
            row.append((signed - zero) * scales[out][g])
        weight.append(row)
    return weight


def _bitsandbytes(config: Mapping[str, Any], linear: Mapping[str, Tensor]) -> list[list[float]]:
    if config.get("load_in_8bit"):
        rows = zip(linear["weight"].tolist(), linear["SCB"].tolist(), strict=True)
        return [[number * largest / 127 for number in row] for row, largest in rows]
    (state_name,) = (name for name in linear if ".quant_state." in name)
    state = json.loads(bytes(linear[state_name].tolist()))
    out_size, in_size = state["shape"]
    largest = linear["weight.absmax"].tolist()
    if "weight.nested_absmax" in linear:
        codes, nested = linear["weight.nested_quant_map"].tolist(), linear["weight.nested_absmax"].tolist()
        size = state["nested_blocksize"]
        largest = [codes[n] * nested[b // size] + state["nested_offset"] for b, n in enumerate(largest)]
    values, octets = linear["weight.quant_map"].tolist(), linear["weight"].flatten().tolist()
    flat = []
    for k in range(out_size * in_size):
        number = octets[k // 2] >> 4 if k % 2 == 0 else octets[k // 2] & 15
        flat.append(values[number] * largest[math.floor(k / state["blocksize"])])
    return [flat[out * in_size : (out + 1) * in_size] for out in range(out_size)]
