"""Floats of 8 bits with scales: one for a weight, one for each output, or one for each block of it."""

import torch
from torch import Tensor

from loraplex_quant.config import QuantConfig
from loraplex_quant.method import FLOATS, QuantFormatError, StoredLinear


class FP8:
    """See `WeightFormat`. weight = number * scale; or number / scale where GPTQModel's config says `inverse`.

    DeepSeek and Qwen call the scale `weight_scale_inv`, and store one for each block; llm-compressor, FBGEMM and others
    call it `weight_scale`. GPTQModel has the first name for what the others' scale is the inverse of.

    Scales of activations are left aside: activations are not rounded here, so that outputs are nearer to the full ones.
    """

    def __init__(self, config: QuantConfig) -> None:
        self._block = config.block
        self._divides = config.divides

    def is_quantized(self, stored: StoredLinear) -> bool:
        """Whether this linear is quantised; what the writer left out has no scale."""
        return "weight_scale" in stored or "weight_scale_inv" in stored

    def read(self, stored: StoredLinear, in_size: int, out_size: int) -> Tensor:
        """Return the weight [out, in] in float32."""
        name = "weight_scale_inv" if "weight_scale_inv" in stored else "weight_scale"
        for unused in ("input_scale", "input_scale_ub", "activation_scale"):
            if unused in stored:
                stored.take(unused, None, FLOATS)
        numbers = stored.take("weight", (out_size, in_size), (torch.float8_e4m3fn,))
        scale = stored.take(name, None, (*FLOATS, torch.float8_e8m0fnu)).float()
        if self._divides:
            scale = scale.reciprocal()
        weight = numbers.to(torch.float32)
        if scale.numel() == 1:
            return weight.mul_(scale.flatten())
        if tuple(scale.shape) in ((out_size,), (out_size, 1)):
            return weight.mul_(scale.view(out_size, 1))
        rows, columns = self._block or (out_size, in_size)
        if tuple(scale.shape) != (-(-out_size // rows), -(-in_size // columns)):
            raise QuantFormatError(
                f"{name} has shape {list(scale.shape)}: neither one scale, nor one for each of {out_size} outputs, "
                f"nor one for each block of {[rows, columns]}"
            )
        for row in range(len(scale)):
            spread = scale[row].repeat_interleave(columns)[:in_size]
            weight[row * rows : (row + 1) * rows].mul_(spread)
        return weight
