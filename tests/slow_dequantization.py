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
        "fp8": _fp8,
        "fbgemm_fp8": _fp8,
    }[config["quant_method"]](config, linear)
    return torch.tensor(weight, dtype=torch.float64)


def _number(word: int, place: int, bits: int) -> int:
    return (word >> (place * bits)) & (2**bits - 1)


def _run_on(words: list[int], place: int, bits: int) -> int:
    """A number of a row of words in which numbers may begin in one word and end in the next."""
    return sum(
        ((words[bit // 32] >> bit % 32) & 1) << k for k, bit in enumerate(range(place * bits, (place + 1) * bits))
    )


def _gptq(config: Mapping[str, Any], linear: Mapping[str, Tensor]) -> list[list[float]]:
    bits = config["bits"]
    words, zero_words, scales = (linear[name].tolist() for name in ("qweight", "qzeros", "scales"))
    columns = [[line[out] for line in words] for out in range(len(scales[0]))]
    added = 0 if config.get("checkpoint_format") == "gptq_v2" else 1
    weight = []
    for out in range(len(scales[0])):
        row = []
        for i, group in enumerate(linear["g_idx"].tolist()):
            zero = (_run_on(zero_words[group], out, bits) + added) % 2**bits
            row.append((_run_on(columns[out], i, bits) - zero) * scales[group][out])
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


def _fp8(config: Mapping[str, Any], linear: Mapping[str, Tensor]) -> list[list[float]]:
    """Numbers of 8 bits with a scale each for all, for an output, or for a block; `inverse` ones divide."""
    scales = linear["weight_scale_inv" if "weight_scale_inv" in linear else "weight_scale"].tolist()
    rows, columns = config.get("weight_block_size") or (1, 10**9)
    weight = []
    for out, octets in enumerate(linear["weight"].view(torch.uint8).tolist()):
        row = []
        for i, octet in enumerate(octets):
            scale = scales
            for place in (out // rows, i // columns):
                scale = scale if isinstance(scale, float) else scale[place if len(scale) > 1 else 0]
            is_inverse = config.get("weight_scale_semantics") == "inverse"
            row.append(_float8(octet) / scale if is_inverse else _float8(octet) * scale)
        weight.append(row)
    return weight


def _float8(octet: int) -> float:
    """What eight bits of e4m3 stand for: a sign, four bits of exponent and three of mantissa."""
    sign, exponent, mantissa = -1 if octet >> 7 else 1, octet >> 3 & 15, octet & 7
    return sign * (mantissa / 8 * 2**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7))


def _compressed_tensors(config: Mapping[str, Any], linear: Mapping[str, Tensor]) -> list[list[float]]:
    scheme = config["config_groups"]["group_0"]["weights"]
    if scheme["type"] == "float":
        return _fp8({"weight_block_size": scheme["block_structure"]}, linear)
    bits = scheme["num_bits"]
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
