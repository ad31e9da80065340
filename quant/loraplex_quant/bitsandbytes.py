"""bitsandbytes' own checkpoints, read without bitsandbytes: 4-bit codes in blocks, and 8-bit rows."""

import json
import math
from typing import Any

import torch
from torch import Tensor

from loraplex_quant.config import QuantConfig
from loraplex_quant.grouped import GroupedWeight
from loraplex_quant.method import QuantFormatError, StoredLinear

INT8_MAX, INT8_ZERO = 127, 128
NUM_CODES = 16
NUM_NESTED_CODES = 256


class BitsAndBytes8:
    """LLM.int8, see `WeightFormat`: weight = number * largest value of its row / 127.

    Activations are not quantised here, so that outputs are nearer to the full weights than with bitsandbytes.
    """

    def is_quantized(self, stored: StoredLinear) -> bool:
        """Whether this linear is quantised; skipped modules have no SCB."""
        return "SCB" in stored

    def read(self, stored: StoredLinear, in_size: int, out_size: int) -> GroupedWeight:
        """Return the weight [out, in], each output a group."""
        if "weight_format" in stored and int(stored.take("weight_format", (), (torch.uint8,))) != 0:
            raise QuantFormatError("its weight_format is not 'row'; save it again with bitsandbytes 0.43 or later")
        numbers = stored.take("weight", (out_size, in_size), (torch.int8,))
        row_max = stored.take("SCB", (out_size,), (torch.float32,))
        # Signed numbers become those above a zero of 128.
        above_zero = numbers.view(torch.uint8).bitwise_xor(INT8_ZERO)
        return GroupedWeight(8, above_zero, torch.full((1, 1), INT8_ZERO), (row_max / INT8_MAX).unsqueeze(-1))


class BitsAndBytes4:
    """NF4 and FP4, see `WeightFormat`: weight = code of its number * largest value of its block, row after row.

    With double quantisation the blocks' largest values are stored as codes too, less their mean.
    """

    def __init__(self, config: QuantConfig) -> None:
        self._state_name = f"weight.quant_state.bitsandbytes__{config.layout}"

    def is_quantized(self, stored: StoredLinear) -> bool:
        """Whether this linear is quantised; skipped modules have no absmax."""
        return "weight.absmax" in stored

    def read(self, stored: StoredLinear, in_size: int, out_size: int) -> Tensor:
        """Return the weight [out, in] in float32."""
        state = _state(stored, self._state_name)
        size, block_size = in_size * out_size, state["blocksize"]
        if list(state["shape"]) != [out_size, in_size]:
            raise QuantFormatError(f"its state says shape {state['shape']}, config.json asks for {[out_size, in_size]}")
        pairs = stored.take("weight", (-(-size // 2), 1), (torch.uint8,)).flatten()
        codes = stored.take("weight.quant_map", (NUM_CODES,), (torch.float32,))
        block_max = _block_max(stored, state, math.ceil(size / block_size))
        # The first of two numbers stands in the upper half of the octet.
        numbers = torch.stack((pairs >> 4, pairs & 15), dim=1).flatten()[:size]
        weight = codes[numbers.int()]
        whole = size // block_size * block_size
        weight[:whole].view(-1, block_size).mul_(block_max[: size // block_size].unsqueeze(-1))
        weight[whole:].mul_(block_max[-1])
        return weight.view(out_size, in_size)


def _state(stored: StoredLinear, name: str) -> dict[str, Any]:
    octets = stored.take(name, None, (torch.uint8,))
    try:
        state: dict[str, Any] = json.loads(bytes(octets.tolist()))
        is_whole = isinstance(state["blocksize"], int) and state["blocksize"] > 0 and len(state["shape"]) == 2
    except (ValueError, KeyError, TypeError) as error:
        raise QuantFormatError(f"'{name}' cannot be read: {error!r}") from None
    if not is_whole:
        raise QuantFormatError(f"'{name}' says blocksize {state['blocksize']} and shape {state['shape']}")
    return state


def _block_max(stored: StoredLinear, state: dict[str, Any], num_blocks: int) -> Tensor:
    found = stored.take("weight.absmax", None, (torch.uint8, torch.float32, torch.bfloat16, torch.float16))
    if tuple(found.shape) != (num_blocks,):
        # bitsandbytes rearranges the weight in place in its first forward pass on a CPU, and then saves that.
        raise QuantFormatError(
            f"weight.absmax has shape {list(found.shape)} in place of [{num_blocks}]: the checkpoint was saved after a "
            "forward pass on a CPU, which spoils it; save it before"
        )
    if "weight.nested_absmax" not in stored:
        if found.dtype == torch.uint8:
            raise QuantFormatError("weight.absmax holds codes, and there is no weight.nested_absmax")
        return found.float()
    nested_size, offset = state.get("nested_blocksize"), state.get("nested_offset")
    if found.dtype != torch.uint8 or not isinstance(nested_size, int) or not isinstance(offset, int | float):
        raise QuantFormatError("weight.nested_absmax is there, but no codes, nested_blocksize or nested_offset")
    codes = stored.take("weight.nested_quant_map", (NUM_NESTED_CODES,), (torch.float32,))
    nested_max = stored.take("weight.nested_absmax", (math.ceil(num_blocks / nested_size),), (torch.float32,))
    return codes[found.int()].mul_(nested_max.repeat_interleave(nested_size)[:num_blocks]).add_(offset)
