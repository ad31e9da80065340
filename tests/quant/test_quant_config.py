"""What of a quantization_config is served, and what --quantize may say about it."""

from typing import Any

import pytest
from slow_dequantization import FIXTURES, quantization_of

from loraplex_quant.config import (
    ON_THE_FLY,
    QuantConfig,
    QuantConfigError,
    check_flag,
    parse_quantization,
    settle_quantization,
)

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": True}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm", "zero_point": True}
SCHEME = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128, "symmetric": True}
COMPRESSED = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "config_groups": {"group_0": {"weights": SCHEME, "targets": ["Linear"]}},
}


def compressed(**changes: Any) -> dict[str, Any]:
    return COMPRESSED | {"config_groups": {"group_0": {"weights": SCHEME | changes}}}


FLOAT_SCHEME = {"num_bits": 8, "type": "float", "strategy": "channel"}
FLOATS = COMPRESSED | {
    "format": "float-quantized",
    "config_groups": {"group_0": {"weights": FLOAT_SCHEME, "input_activations": {"num_bits": 8, "dynamic": True}}},
}

SERVED: list[tuple[dict[str, Any] | None, QuantConfig | None]] = [
    (None, None),
    (GPTQ, QuantConfig("gptq", "v1", 4, 128, True)),
    (GPTQ | {"checkpoint_format": "gptq_v2", "sym": False}, QuantConfig("gptq", "v2", 4, 128, False)),
    (GPTQ | {"meta": {"quantizer": ["gptqmodel:1.0"]}}, QuantConfig("gptq", "v1-words", 4, 128, True)),
    (GPTQ | {"bits": 3, "meta": {"quantizer": "gptqmodel:6.0.3"}}, QuantConfig("gptq", "v1-words", 3, 128, True)),
    (GPTQ | {"bits": 3, "meta": {"quantizer": "gptqmodel:7.0.0"}}, QuantConfig("gptq", "v1", 3, 128, True)),
    (GPTQ | {"dynamic": {"-:.*down_proj": {}}}, QuantConfig("gptq", "v1", 4, 128, True)),
    (AWQ, QuantConfig("awq", "gemm", 4, 128, False)),
    (
        {"quant_method": "awq", "w_bit": 4, "q_group_size": 64, "version": "GEMV"},
        QuantConfig("awq", "gemv", 4, 64, False),
    ),
    (compressed(), QuantConfig("compressed-tensors", "pack-quantized", 4, 128, True)),
    (
        compressed(num_bits=8, strategy="channel", group_size=None),
        QuantConfig("compressed-tensors", "pack-quantized", 8, -1, True),
    ),
    ({"quant_method": "bitsandbytes", "load_in_8bit": True}, QuantConfig("bitsandbytes", "int8", 8)),
    ({"quant_method": "bitsandbytes", "load_in_4bit": True}, QuantConfig("bitsandbytes", "fp4", 4)),
    (FLOATS, QuantConfig("compressed-tensors", "fp8", 8)),
    ({"quant_method": "fp8", "weight_block_size": [128, 64]}, QuantConfig("fp8", "fp8", 8, block=(128, 64))),
    ({"quant_method": "fbgemm_fp8"}, QuantConfig("fp8", "fp8", 8)),
    ({"quant_method": "fp8", "weight_scale_semantics": "inverse"}, QuantConfig("fp8", "fp8", 8, divides=True)),
]


@pytest.mark.parametrize(("raw", "parsed"), SERVED)
def test_what_is_served_is_named(raw: dict[str, Any] | None, parsed: QuantConfig | None) -> None:
    assert parse_quantization(raw) == parsed


def test_every_fixtures_config_is_served() -> None:
    for folder in FIXTURES.iterdir():
        assert not folder.is_dir() or parse_quantization(quantization_of(folder)) is not None


REFUSED: list[tuple[Any, str]] = [
    ("gptq", "not a JSON object"),
    ([], "not a JSON object"),
    ({}, "format 'unknown' are not served; served are gptq, awq, compressed-tensors, bitsandbytes"),
    ({"quant_method": "exl2"}, "format 'exl2'"),
    (GPTQ | {"bits": 5}, "gptq weights with bits 5 are not served; served: 2, 3, 4, 8"),
    (GPTQ | {"bits": 3, "checkpoint_format": "gptq_p"}, "format gptq_p"),
    (GPTQ | {"group_size": 0}, "group_size 0"),
    (GPTQ | {"group_size": "128"}, "group_size 128"),
    (GPTQ | {"is_marlin_format": True}, "format marlin"),
    (GPTQ | {"checkpoint_format": "bitblas"}, "format bitblas"),
    (GPTQ | {"lm_head": True}, "lm_head"),
    (GPTQ | {"pack_dtype": "int64"}, "pack_dtype int64"),
    (GPTQ | {"dynamic": {"+:.*down_proj": {"bits": 8}}}, r"dynamic rule '\+:\.\*down_proj'"),
    ({"quant_method": "gptq"}, "gptq quantization_config of the checkpoint is broken: KeyError"),
    (AWQ | {"bits": 8}, "awq weights with bits 8"),
    (AWQ | {"version": "gemv_fast"}, "version gemv_fast"),
    (AWQ | {"zero_point": False}, "zero_point False"),
    (compressed(num_bits=2), "weights int2"),
    (compressed(type="float", num_bits=8), "weights float8"),
    (compressed(strategy="tensor"), "strategy tensor"),
    (COMPRESSED | {"format": "float-quantized"}, "format float-quantized"),
    (FLOATS | {"kv_cache_scheme": {"num_bits": 8}}, "weights only"),
    ({"quant_method": "fp8", "fmt": "e5m2"}, "fmt e5m2"),
    ({"quant_method": "fp8", "weight_scale_semantics": "log"}, "weight_scale_semantics log"),
    ({"quant_method": "fp8", "weight_block_size": [128]}, r"a block of \[128\]"),
    (COMPRESSED | {"kv_cache_scheme": {"num_bits": 8}}, "weights only"),
    (COMPRESSED | {"sparsity_config": {"format": "sparse-24-bitmask"}}, "weights only"),
    (COMPRESSED | {"config_groups": {}}, "config_groups of 0 schemes"),
    (
        COMPRESSED | {"config_groups": {"a": {"weights": SCHEME, "input_activations": {"num_bits": 8}}}},
        "input_activations quantised",
    ),
    ({"quant_method": "bitsandbytes"}, "load_in_8bit"),
    ({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "int4"}, "int4"),
]


@pytest.mark.parametrize(("raw", "message"), REFUSED)
def test_what_is_not_served_is_refused_with_what_is(raw: Any, message: str) -> None:
    with pytest.raises(QuantConfigError, match=message):
        parse_quantization(raw)


NF4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


@pytest.mark.parametrize(
    ("wanted", "raw"),
    [
        ("gptq", GPTQ),
        ("awq", AWQ),
        ("compressed-tensors", COMPRESSED),
        ("bitsandbytes", NF4),
        ("bitsandbytes-nf4", NF4),
    ],
)
def test_the_flag_may_repeat_what_the_checkpoint_is(wanted: str, raw: dict[str, Any]) -> None:
    assert settle_quantization(wanted, raw) == (parse_quantization(raw), None) == settle_quantization(None, raw)


@pytest.mark.parametrize(
    ("wanted", "raw", "message"),
    [
        ("awq", GPTQ, "the checkpoint's weights are gptq"),
        ("int8", GPTQ, "the checkpoint's weights are gptq: leave the flag out"),
        ("bitsandbytes-fp4", NF4, "the checkpoint's weights are bitsandbytes-nf4"),
        ("gptq", None, "not quantised: .* or quantise while loading with int8, int4, eetq, bitsandbytes"),
    ],
)
def test_a_flag_that_contradicts_the_checkpoint_is_refused(
    wanted: str, raw: dict[str, Any] | None, message: str
) -> None:
    with pytest.raises(QuantConfigError, match=message):
        settle_quantization(wanted, raw)


@pytest.mark.parametrize("wanted", ["int8", "int4", "eetq", "bitsandbytes", "bitsandbytes-nf4", "bitsandbytes-fp4"])
def test_plain_weights_are_quantised_to_what_the_flag_says(wanted: str) -> None:
    assert settle_quantization(wanted, None) == (None, ON_THE_FLY[wanted])


@pytest.mark.parametrize("wanted", ["exl2", "marlin", "hqq-4bit", "INT8", ""])
def test_a_flag_that_is_not_served_is_refused_by_itself(wanted: str) -> None:
    with pytest.raises(QuantConfigError, match=f"--quantize {wanted} is not served; served are gptq, awq"):
        check_flag(wanted)
