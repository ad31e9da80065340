"""Quantised linears: our product against the weight that a slow loop takes apart."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from slow_dequantization import FIXTURES, checkpoint_tensors, linear_tensors, quantization_of, slow_weight
from torch import Tensor

from loraplex_quant.config import parse_quantization
from loraplex_quant.grouped import plain
from loraplex_quant.method import LinearWeight, QuantFormatError
from loraplex_quant.packing import unpack
from loraplex_quant.registry import weight_format
from loraplex_quant.unquantized import Unquantized

ALL_FIXTURES = sorted(path for path in FIXTURES.iterdir() if path.is_dir())


class Stored:
    """The tensors of one linear, in memory; see `StoredLinear`."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors

    def __contains__(self, suffix: str) -> bool:
        return suffix in self._tensors

    def take(self, suffix: str, shape: tuple[int, ...] | None, dtypes: tuple[torch.dtype, ...]) -> Tensor:
        tensor = self._tensors[suffix]
        assert shape is None or tuple(tensor.shape) == shape, f"{suffix} is {list(tensor.shape)}, asked for {shape}"
        assert tensor.dtype in dtypes, f"{suffix} is of {tensor.dtype}"
        return tensor


def dequantize(config: dict[str, Any], tensors: Mapping[str, Tensor], in_size: int, out_size: int) -> Tensor:
    parsed = parse_quantization(config)
    assert parsed is not None
    stored = Stored(tensors)
    assert weight_format(parsed).is_quantized(stored)
    return plain(weight_format(parsed).read(stored, in_size, out_size))


def words(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-(2**31), 2**31, shape, generator=generator).to(torch.int32)


def scales(shape: tuple[int, ...], seed: int = 9) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) + 0.1


@pytest.mark.parametrize("folder", ALL_FIXTURES, ids=lambda path: path.name)
def test_a_layers_output_is_the_product_with_the_weight_as_written(folder: Path) -> None:
    config, tensors = quantization_of(folder), checkpoint_tensors(folder)
    for module in ("model.layers.0.self_attn.k_proj", "model.layers.1.mlp.down_proj"):
        linear = linear_tensors(tensors, module)
        truth = slow_weight(config, linear)
        weight = dequantize(config, linear, truth.shape[1], truth.shape[0])
        method = Unquantized([LinearWeight(weight)], torch.float32, torch.device("cpu"))
        x = torch.randn(3, truth.shape[1], generator=torch.Generator().manual_seed(1))
        expected = x.double() @ truth.T
        assert (method.apply(x) - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("checkpoint_format", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("group_size", [16, 48, -1])
def test_gptq_of_any_bits_with_shuffled_groups_and_every_zero(
    bits: int, checkpoint_format: str, group_size: int
) -> None:
    in_size, out_size = 64, 32
    num_groups = 1 if group_size == -1 else -(-in_size // group_size)
    config = {"quant_method": "gptq", "bits": bits, "group_size": group_size, "checkpoint_format": checkpoint_format}
    tensors = {
        "qweight": words((in_size * bits // 32, out_size)),
        "qzeros": words((num_groups, out_size * bits // 32), seed=1),
        "scales": scales((num_groups, out_size)),
        "g_idx": torch.randperm(in_size, generator=torch.Generator().manual_seed(2)).to(torch.int32) % num_groups,
    }
    ours = dequantize(config, tensors, in_size, out_size)
    assert torch.allclose(ours.double(), slow_weight(config, tensors), atol=1e-4)


def test_gptq_without_g_idx_has_its_groups_in_order() -> None:
    config = {"quant_method": "gptq", "bits": 4, "group_size": 16, "sym": True}
    tensors = {"qweight": words((8, 32)), "qzeros": words((4, 4), seed=1), "scales": scales((4, 32))}
    in_order = tensors | {"g_idx": (torch.arange(64) // 16).to(torch.int32)}
    assert torch.allclose(dequantize(config, tensors, 64, 32).double(), slow_weight(config, in_order), atol=1e-4)


# What each word of zeros in turn loses in gptqmodel's `convert_gptq_v2_to_v1_format_module`, as it is written there.
LOST = [
    (2, "gptqmodel:7.6.0", (0b01010101010101010101010101010101,)),
    (
        3,
        "gptqmodel:6.0.3",
        (0b00100100100100100100100100100100, 0b10010010010010010010010010010010, 0b01001001001001001001001001001001),
    ),
    (4, "gptqmodel:7.6.0", (0b00010001000100010001000100010001,)),
]


@pytest.mark.parametrize(("bits", "quantizer", "lost"), LOST)
def test_gptqmodels_v1_zeros_are_the_v2_zeros_less_one_a_word(bits: int, quantizer: str, lost: tuple[int, ...]) -> None:
    zeros = words((4, bits), seed=1)
    assert 0 in unpack(zeros, bits), "a zero of 0 borrows from its neighbour, which this test is about"
    shared = {"qweight": words((2 * bits, 32)), "scales": scales((4, 32))}
    config = {"quant_method": "gptq", "bits": bits, "group_size": 16, "meta": {"quantizer": [quantizer]}}
    stored = (zeros.long() - torch.tensor(lost).repeat(bits // len(lost))).to(torch.int32)
    v1 = dequantize(config, shared | {"qzeros": stored}, 64, 32)
    v2 = dequantize(config | {"checkpoint_format": "gptq_v2"}, shared | {"qzeros": zeros}, 64, 32)
    assert torch.equal(v1, v2)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("is_shuffled", [False, True])
def test_compressed_tensors_with_zero_points_and_sizes_that_end_inside_a_word(bits: int, is_shuffled: bool) -> None:
    weights = {"num_bits": bits, "strategy": "group", "group_size": 10, "symmetric": False, "type": "int"}
    config = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
    config |= {"config_groups": {"group_0": {"weights": weights}}}
    per_word, in_size, out_size = 32 // bits, 30, 21
    tensors = {
        "weight_packed": words((out_size, -(-in_size // per_word))),
        "weight_zero_point": words((-(-out_size // per_word), 3), seed=1),
        "weight_scale": scales((out_size, 3)),
        "weight_shape": torch.tensor([out_size, in_size]),
    }
    if is_shuffled:
        tensors["weight_g_idx"] = torch.randperm(in_size, generator=torch.Generator().manual_seed(2)) % 3
    ours = dequantize(config, tensors, in_size, out_size)
    assert torch.allclose(ours.double(), slow_weight(config, tensors), atol=1e-4)


def test_a_bitsandbytes_weight_may_end_inside_a_block() -> None:
    config = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    state = json.dumps({"blocksize": 64, "shape": [7, 22], "quant_type": "nf4", "dtype": "bfloat16"})
    tensors = {
        "weight": words((20,)).view(torch.uint8)[:77].unsqueeze(1),
        "weight.absmax": scales((3,)),
        "weight.quant_map": scales((16,), seed=2),
        "weight.quant_state.bitsandbytes__nf4": torch.tensor(list(state.encode()), dtype=torch.uint8),
    }
    ours = dequantize(config, tensors, 22, 7)
    assert torch.allclose(ours.double(), slow_weight(config, tensors), atol=1e-5)


def bitsandbytes_linear() -> tuple[dict[str, Any], dict[str, Tensor]]:
    folder = FIXTURES / "bnb-nf4-double"
    return quantization_of(folder), linear_tensors(checkpoint_tensors(folder), "model.layers.0.mlp.down_proj")


def test_a_bitsandbytes_file_saved_after_a_forward_pass_is_refused() -> None:
    config, tensors = bitsandbytes_linear()
    tensors["weight.absmax"] = torch.zeros(5, 64, dtype=torch.bfloat16)
    with pytest.raises(QuantFormatError, match=r"shape \[5, 64\] .* saved after a forward pass"):
        dequantize(config, tensors, 320, 64)


BROKEN_STATES = [b"", b"[]", b"{}", b'{"blocksize": 0, "shape": [64, 320]}', b"\xff"]


@pytest.mark.parametrize("state", BROKEN_STATES)
def test_a_broken_bitsandbytes_state_is_refused(state: bytes) -> None:
    config, tensors = bitsandbytes_linear()
    tensors["weight.quant_state.bitsandbytes__nf4"] = torch.tensor(list(state), dtype=torch.uint8)
    with pytest.raises(QuantFormatError, match="quant_state"):
        dequantize(config, tensors, 320, 64)


@pytest.mark.parametrize("g_idx", [-1, 4])
def test_a_group_that_does_not_exist_is_refused(g_idx: int) -> None:
    config = {"quant_method": "gptq", "bits": 4, "group_size": 16}
    tensors = {"qweight": words((8, 32)), "qzeros": words((4, 4)), "scales": scales((4, 32))}
    tensors["g_idx"] = torch.full((64,), g_idx, dtype=torch.int32)
    with pytest.raises(QuantFormatError, match="g_idx names groups outside 0 to 3"):
        dequantize(config, tensors, 64, 32)


@pytest.mark.parametrize("version", ["gemm", "gemv"])
def test_an_awq_group_size_that_does_not_divide_the_inputs_is_refused(version: str) -> None:
    config = {"quant_method": "awq", "bits": 4, "group_size": 48, "version": version, "zero_point": True}
    with pytest.raises(QuantFormatError, match="group_size 48 does not divide the 64 inputs"):
        dequantize(config, {}, 64, 32)


def test_a_linear_that_does_not_fill_words_is_refused() -> None:
    with pytest.raises(QuantFormatError, match=r"\[32, 60\] does not fill whole words"):
        dequantize({"quant_method": "gptq", "bits": 4, "group_size": -1}, {}, 60, 32)


BLOCKS = {"quant_method": "fp8", "weight_block_size": [16, 24]}


@pytest.mark.parametrize(
    ("config", "suffix", "shape", "dtype"),
    [
        ({"quant_method": "fp8"}, "weight_scale", (), torch.float32),
        ({"quant_method": "fp8", "activation_scheme": "static"}, "weight_scale", (1,), torch.bfloat16),
        ({"quant_method": "fbgemm_fp8"}, "weight_scale", (40, 1), torch.float32),
        (BLOCKS, "weight_scale_inv", (3, 3), torch.float32),
        (BLOCKS, "weight_scale_inv", (3, 3), torch.float8_e8m0fnu),
        (BLOCKS | {"weight_scale_semantics": "inverse"}, "weight_scale_inv", (3, 3), torch.float32),
    ],
)
def test_floats_of_8_bits_with_scales_of_any_reach(
    config: dict[str, Any], suffix: str, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    numbers = torch.randn(40, 60, generator=torch.Generator().manual_seed(1)).to(torch.float8_e4m3fn)
    scale = scales(shape or (1,)).view(shape).to(dtype)
    tensors = {"weight": numbers, suffix: scale, "input_scale": scales((1,))}
    ours = dequantize(config, tensors, 60, 40)
    assert torch.allclose(ours.double(), slow_weight(config, tensors), rtol=1e-6)


def test_scales_that_fit_no_block_are_refused() -> None:
    tensors = {"weight": torch.zeros(40, 60).to(torch.float8_e4m3fn), "weight_scale_inv": scales((2, 3))}
    with pytest.raises(QuantFormatError, match=r"shape \[2, 3\].* block of \[16, 24\]"):
        dequantize(BLOCKS, tensors, 60, 40)
