"""Quantising plain weights while they are loaded: to whole numbers with scales, or to the codes of bitsandbytes."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from loraplex_quant.grouped import GroupedWeight

# Rows are taken in runs of about so many numbers, so that what is computed on the way takes little memory.
RUN_NUMBERS = 1 << 22
INT8_MAX, INT8_ZERO = 127, 128
INT4_MAX, INT4_ZERO, INT4_GROUP = 15, 8, 32
INT4_FITS = 2  # squared errors become a tenth smaller; a third makes no difference
BLOCK = 64
FP8_MAX = 448.0
# The sixteen values of 4-bit NormalFloat (arXiv 2305.14314, appendix E) and of bitsandbytes' 4-bit floats.
NF4_CODES = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
FP4_MAGNITUDES = (0.0, 0.0625 / 12, 2 / 12, 3 / 12, 4 / 12, 6 / 12, 8 / 12, 1.0)
FP4_CODES = tuple(sorted({sign * magnitude for magnitude in FP4_MAGNITUDES for sign in (-1.0, 1.0)}))


def round_weight(weight: Tensor, kind: str) -> Tensor | GroupedWeight:
    """Quantise a plain weight [out, in] to `kind`: int8, int4, nf4, fp4 or fp8; see the functions below."""
    return _ROUNDINGS[kind](weight)


def round_to_int8(weight: Tensor) -> GroupedWeight:
    """Keep 8 bits, with one scale for each output; scales are numbers of bfloat16, as the kernel holds them."""
    numbers = torch.empty(weight.shape, dtype=torch.uint8)
    scales = torch.empty(len(weight), 1)
    for rows, run in _runs(weight):
        scale = _bfloat16(run.abs().amax(1, keepdim=True).div_(INT8_MAX).clamp_(min=1e-30))
        scales[rows] = scale
        numbers[rows] = run.div_(scale).round_().clamp_(-INT8_MAX, INT8_MAX).add_(INT8_ZERO).to(torch.uint8)
    return GroupedWeight(8, numbers, torch.full((1, 1), INT8_ZERO), scales)


def round_to_int4(weight: Tensor) -> GroupedWeight:
    """Keep 4 bits, with a scale and an offset for each 32 inputs of an output; 8 bits where 32 does not divide them.

    Scales and offsets first span a group, and are then fitted to the rounded numbers by least squares. They are numbers
    of bfloat16.
    """
    out_size, in_size = weight.shape
    if in_size % INT4_GROUP:
        return round_to_int8(weight)
    numbers = torch.empty(weight.shape, dtype=torch.uint8)
    scales, zeros = torch.empty(2, out_size, in_size // INT4_GROUP)
    for rows, run in _runs(weight):
        grouped = run.view(len(run), -1, INT4_GROUP)
        low, high = grouped.aminmax(dim=-1, keepdim=True)
        scale, offset = _bounded((high - low) / INT4_MAX, low)
        for _ in range(INT4_FITS):
            scale, offset = _bounded(*_fitted(grouped, _nearest(grouped, scale, offset)))
        numbers[rows] = _nearest(grouped, scale, offset).flatten(1).to(torch.uint8)
        scales[rows], zeros[rows] = scale.squeeze(-1), (-offset / scale).squeeze(-1)
    return GroupedWeight(4, numbers, zeros, scales)


def _bounded(scale: Tensor, low: Tensor) -> tuple[Tensor, Tensor]:
    """The scale, and what the number 0 stands for, such that both are exact as the kernel holds them."""
    # Where all numbers of a group are nearly equal: not so small that its offset is lost beside it.
    scale = _bfloat16(torch.maximum(scale, low.abs() * 2**-12).clamp_(min=1e-30))
    return scale, _bfloat16(low + INT4_ZERO * scale) - INT4_ZERO * scale


def _fitted(grouped: Tensor, rounded: Tensor) -> tuple[Tensor, Tensor]:
    """The scale and the offset with which the rounded numbers are nearest to those they stand for."""
    mean, rounded_mean = grouped.mean(-1, keepdim=True), rounded.mean(-1, keepdim=True)
    spread = rounded - rounded_mean
    scale = ((grouped - mean) * spread).sum(-1, keepdim=True) / spread.square().sum(-1, keepdim=True).clamp_(min=1)
    return scale, mean - scale * rounded_mean


def _nearest(grouped: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    return (grouped - offset).div_(scale).round_().clamp_(0, INT4_MAX)


def round_to_codes(weight: Tensor, codes: tuple[float, ...]) -> Tensor:
    """Bring each number to the nearest code times the largest value of its 64, row after row, as bitsandbytes does."""
    values = torch.tensor(codes)
    borders = (values[1:] + values[:-1]) / 2
    flat = weight.reshape(-1)
    rounded = torch.empty(flat.shape, dtype=torch.float32)
    for first in range(0, len(flat), RUN_NUMBERS):
        run = flat[first : first + RUN_NUMBERS].float()
        whole = len(run) // BLOCK * BLOCK
        for start, end in ((0, whole), (whole, len(run))):
            if start < end:
                blocks = run[start:end].view(-1, min(BLOCK, end - start))
                largest = blocks.abs().amax(1, keepdim=True)
                codes_of = torch.bucketize(blocks / largest.clamp(min=1e-30), borders)
                rounded[first + start : first + end] = (values[codes_of] * largest).flatten()
    return rounded.view(weight.shape)


def round_to_fp8(weight: Tensor) -> Tensor:
    """Bring each number to a float of 8 bits (e4m3), with one scale for each output."""
    rounded = torch.empty(weight.shape, dtype=torch.float32)
    for rows, run in _runs(weight):
        scale = run.abs().amax(1, keepdim=True).div_(FP8_MAX).clamp_(min=1e-30)
        rounded[rows] = (run / scale).to(torch.float8_e4m3fn).float().mul_(scale)
    return rounded


def _bfloat16(numbers: Tensor) -> Tensor:
    return numbers.to(torch.bfloat16).float()


def _runs(weight: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Runs of rows, in float32 and in memory of their own."""
    step = max(1, RUN_NUMBERS // weight.shape[1])
    for first in range(0, len(weight), step):
        rows = slice(first, min(first + step, len(weight)))
        yield rows, weight[rows].to(torch.float32, copy=True)


_ROUNDINGS: dict[str, Callable[[Tensor], Tensor | GroupedWeight]] = {
    "int8": round_to_int8,
    "int4": round_to_int4,
    "nf4": lambda weight: round_to_codes(weight, NF4_CODES),
    "fp4": lambda weight: round_to_codes(weight, FP4_CODES),
    "fp8": round_to_fp8,
}
