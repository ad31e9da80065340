"""Rotary position embedding and its scalings: the angles of each token."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from loraplex_models.config import RopeConfig


class RopeError(ValueError):
    """A rotary scaling is not served, or lacks a number; the message says which."""


class Rotary:
    """Computes the cosines and sines of a step's positions, once for all layers."""

    def __init__(
        self, rope: RopeConfig, head_dim: int, max_positions: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        """Derive the frequencies from the config. Raises RopeError."""
        if rope.parameters.get("partial_rotary_factor", 1.0) != 1.0:
            raise RopeError("rope with a partial_rotary_factor is not served")
        if rope.kind != "dynamic" and rope.kind not in _SCALINGS:
            raise RopeError(f"rope scaling '{rope.kind}' is not served; served are dynamic, {', '.join(_SCALINGS)}")
        self._dtype = dtype
        self._half = head_dim // 2
        self._dynamic: _DynamicBase | None = None
        self._attention_scaling = 1.0
        if rope.kind == "dynamic":
            self._dynamic = _DynamicBase(rope, head_dim, max_positions, device)
            frequencies = _plain_frequencies(rope.theta, head_dim)
        else:
            frequencies, self._attention_scaling = _SCALINGS[rope.kind](rope, head_dim, max_positions)
        self._frequencies = frequencies.to(device)
        self._signs = torch.cat((-torch.ones(self._half), torch.ones(self._half))).to(device)

    def angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return the cosines and signed sines, [T, head_dim] each, that loraplex_kernels.kv_cache takes."""
        frequencies = self._frequencies if self._dynamic is None else self._dynamic.frequencies(positions)
        angles = positions.unsqueeze(1) * frequencies
        angles = torch.cat((angles, angles), -1)
        cos, sin = angles.cos(), angles.sin().mul_(self._signs)
        if self._attention_scaling != 1.0:
            cos.mul_(self._attention_scaling)
            sin.mul_(self._attention_scaling)
        return cos.to(self._dtype), sin.to(self._dtype)


class _DynamicBase:
    """NTK scaling whose base grows with the length beyond the positions that the model was trained on.

    Each token's base follows from its own position, so that a sequence's keys are the same however its prompt was
    cut into chunks and whatever else was in the batch.
    """

    def __init__(self, rope: RopeConfig, head_dim: int, max_positions: int, device: torch.device) -> None:
        self._theta = rope.theta
        self._factor = _number(rope, "factor")
        self._max_positions = max_positions
        self._exponent = head_dim / (head_dim - 2)
        self._powers = _powers(head_dim).to(device)

    def frequencies(self, positions: Tensor) -> Tensor:
        """Return [T, head_dim / 2]."""
        lengths = (positions + 1).clamp_(min=self._max_positions).double()
        stretch = self._factor * lengths / self._max_positions - (self._factor - 1)
        base = (self._theta * stretch**self._exponent).float()
        return 1.0 / base.unsqueeze(1) ** self._powers


def _powers(head_dim: int) -> Tensor:
    return torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim


def _plain_frequencies(theta: float, head_dim: int) -> Tensor:
    return 1.0 / theta ** _powers(head_dim)


def _number(rope: RopeConfig, key: str, default: float | None = None) -> float:
    value: Any = rope.parameters.get(key, default)
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise RopeError(f"rope scaling '{rope.kind}' needs a number '{key}'; the config has {value!r}")
    return float(value)


def _default(rope: RopeConfig, head_dim: int, max_positions: int) -> tuple[Tensor, float]:
    return _plain_frequencies(rope.theta, head_dim), 1.0


def _linear(rope: RopeConfig, head_dim: int, max_positions: int) -> tuple[Tensor, float]:
    return _plain_frequencies(rope.theta, head_dim) / _number(rope, "factor"), 1.0


def _llama3(rope: RopeConfig, head_dim: int, max_positions: int) -> tuple[Tensor, float]:
    """Llama 3.1: long wavelengths are stretched by the factor, short ones are kept, those between are blended."""
    factor = _number(rope, "factor")
    low, high = _number(rope, "low_freq_factor"), _number(rope, "high_freq_factor")
    original = _number(rope, "original_max_position_embeddings")
    plain = _plain_frequencies(rope.theta, head_dim)
    wavelengths = 2 * math.pi / plain
    share = (original / wavelengths - low) / (high - low)
    blended = (1 - share) * plain / factor + share * plain
    scaled = torch.where(wavelengths > original / low, plain / factor, plain)
    between = (wavelengths <= original / low) & (wavelengths >= original / high)
    return torch.where(between, blended, scaled), 1.0


def _yarn(rope: RopeConfig, head_dim: int, max_positions: int) -> tuple[Tensor, float]:
    """YaRN (arXiv 2309.00071): interpolate what turns seldom, keep what turns often, blend between."""
    factor = _number(rope, "factor")
    original = _number(rope, "original_max_position_embeddings", max_positions)

    def dimension(num_turns: float) -> float:
        return head_dim * math.log(original / (num_turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension(_number(rope, "beta_fast", 32)), dimension(_number(rope, "beta_slow", 1))
    if rope.parameters.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    width = (high - low) or 0.001
    interpolated_share = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / width).clamp(0, 1)
    plain = _plain_frequencies(rope.theta, head_dim)
    frequencies = plain / factor * interpolated_share + plain * (1 - interpolated_share)
    return frequencies, _yarn_attention_scaling(rope, factor)


def _yarn_attention_scaling(rope: RopeConfig, factor: float) -> float:
    def scale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if rope.parameters.get("attention_factor") is not None:
        return _number(rope, "attention_factor")
    if rope.parameters.get("mscale") and rope.parameters.get("mscale_all_dim"):
        return scale(_number(rope, "mscale")) / scale(_number(rope, "mscale_all_dim"))
    return scale(1.0)


def _longrope(rope: RopeConfig, head_dim: int, max_positions: int) -> tuple[Tensor, float]:
    """LongRoPE (arXiv 2402.13753) up to the original length, where the short factors hold."""
    factor, original = _number(rope, "factor"), _number(rope, "original_max_position_embeddings")
    short = rope.parameters.get("short_factor")
    if not isinstance(short, list) or len(short) != head_dim // 2:
        raise RopeError(
            f"rope scaling 'longrope' needs {head_dim // 2} numbers as short_factor; the config has {short}"
        )
    default = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    scaling = default if rope.parameters.get("attention_factor") is None else _number(rope, "attention_factor")
    return _plain_frequencies(rope.theta, head_dim) / torch.tensor(short, dtype=torch.float32), scaling


_SCALINGS: dict[str, Callable[[RopeConfig, int, int], tuple[Tensor, float]]] = {
    "default": _default,
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
}
