"""Which class reads which weight format."""

from collections.abc import Callable

from loraplex_quant.awq import AWQ
from loraplex_quant.bitsandbytes import BitsAndBytes4, BitsAndBytes8
from loraplex_quant.compressed_tensors import CompressedTensors
from loraplex_quant.config import QuantConfig
from loraplex_quant.fp8 import FP8
from loraplex_quant.gptq import GPTQ
from loraplex_quant.method import WeightFormat

FORMATS: dict[str, Callable[[QuantConfig], WeightFormat]] = {
    "gptq": GPTQ,
    "awq": AWQ,
    "compressed-tensors": CompressedTensors,
    "fp8": FP8,
    "bitsandbytes": lambda config: BitsAndBytes8() if config.layout == "int8" else BitsAndBytes4(config),
}


def weight_format(config: QuantConfig) -> WeightFormat:
    """Return the reader of a checkpoint's quantised linears."""
    return FORMATS["fp8" if config.layout == "fp8" else config.method](config)
