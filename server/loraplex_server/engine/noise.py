"""Random numbers that depend on a request's seed, the position in its output and the token id, and on nothing else."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Keys = NDArray[np.uint64]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_TOKEN_SALT = 0x5BD1E995
# The multipliers of the 32-bit mixer "lowbias32", as the signed numbers of int32 tensors.
_MULTIPLIER_1 = 0x7FEB352D
_MULTIPLIER_2 = 0x846CA68B - (1 << 32)


def seed_keys(seeds: list[int]) -> Keys:
    """One key for each seed (0 … 2^64 - 1); different seeds give different keys."""
    return _mix64(np.array(seeds, dtype=np.uint64) + _GOLDEN)


def step_keys(keys: Keys, positions: NDArray[np.int64]) -> Keys:
    """The keys of one step: of a seed's key, at a position of its output."""
    return _mix64(keys + (positions.astype(np.uint64) + np.uint64(1)) * _GOLDEN)


class TokenNoise:
    """Exponential noise over the vocabulary: a hash of (key, token id), so any row can be made again anywhere."""

    def __init__(self, vocab_size: int, device: torch.device):
        ids = torch.arange(vocab_size, dtype=torch.int32)
        self._token_bits = _mix32(ids ^ _TOKEN_SALT, 0).to(device)

    def exponential(self, keys: Keys) -> Tensor:
        """Draws of the exponential distribution of mean 1: one row a key. Returns [keys, vocab] float32, above 0.

        argmax(p / noise) is a draw from p (the Gumbel-max trick, without its logarithms). It compares tokens one
        by one, so a rounding difference in p changes the draw as seldom as can be; inverting the cumulative
        distribution with one number a row would carry each difference on to every later token.
        """
        halves = torch.from_numpy(keys.view(np.int32).reshape(-1, 2)).to(self._token_bits.device)
        bits = _mix32(self._token_bits + halves[:, :1], halves[:, 1:])
        # The 31 low bits are a uniform number in (0, 1) with an even grid down to 2^-32: rare tokens win by tiny noise.
        uniform = bits.bitwise_and_(0x7FFFFFFF).float().add_(0.5).mul_(-(2.0**-31))
        return uniform.log1p_().neg_()


def _mix64(x: Keys) -> Keys:
    """The finaliser of splitmix64: a bijection of 64 bits."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _mix32(x: Tensor, key: Tensor | int) -> Tensor:
    """Mix int32 `x` in place, a bijection for each key: lowbias32 with the key put in half-way."""
    scratch = torch.empty_like(x)

    def fold(shift: int) -> None:
        torch.bitwise_right_shift(x, shift, out=scratch)  # arithmetic: the mask drops the copies of the sign
        x.bitwise_xor_(scratch.bitwise_and_((1 << (32 - shift)) - 1))

    fold(16)
    x.mul_(_MULTIPLIER_1)
    fold(15)
    x.bitwise_xor_(key)
    x.mul_(_MULTIPLIER_2)
    fold(16)
    return x
