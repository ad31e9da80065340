import math

import numpy as np
import torch

from loraplex_server.engine.noise import TokenNoise, seed_keys, step_keys

CPU = torch.device("cpu")
MASK32 = (1 << 32) - 1
MASK64 = (1 << 64) - 1


def noise_of(seed: int, position: int, vocab_size: int) -> torch.Tensor:
    keys = step_keys(seed_keys([seed]), np.array([position]))
    return TokenNoise(vocab_size, CPU).exponential(keys)[0]


def by_hand(seed: int, position: int, token_id: int) -> float:
    """The same hash in Python's integers."""

    def mix64(x: int) -> int:
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK64
        return x ^ (x >> 31)

    def mix32(x: int, key: int) -> int:
        x = ((x ^ (x >> 16)) * 0x7FEB352D) & MASK32
        x = ((x ^ (x >> 15) ^ key) * 0x846CA68B) & MASK32
        return x ^ (x >> 16)

    golden = 0x9E3779B97F4A7C15
    key = mix64((mix64((seed + golden) & MASK64) + (position + 1) * golden) & MASK64)
    bits = mix32((mix32(token_id ^ 0x5BD1E995, 0) + (key & MASK32)) & MASK32, key >> 32)
    return -math.log1p(-((bits & 0x7FFFFFFF) + 0.5) * 2.0**-31)


def test_noise_is_the_documented_hash_on_any_machine():
    for seed, position in [(0, 0), (1, 0), (2**64 - 1, 7), (123456789, 2**31)]:
        noise = noise_of(seed, position, 1000)
        expected = [by_hand(seed, position, token_id) for token_id in range(1000)]
        torch.testing.assert_close(noise, torch.tensor(expected), rtol=1e-5, atol=1e-9)


def test_noise_is_exponential():
    noise = noise_of(5, 3, 200_000).double()
    assert noise.min() > 0
    assert noise.isfinite().all()
    for quantile in (0.001, 0.01, 0.1, 0.5, 0.9, 0.99, 0.999):
        expected = -math.log1p(-quantile)
        share = (noise < expected).double().mean().item()
        assert abs(share - quantile) < 5 * math.sqrt(quantile * (1 - quantile) / len(noise))


def test_neighbouring_seeds_positions_and_tokens_are_uncorrelated():
    many = 100_000
    base = noise_of(42, 10, many)
    for other in (noise_of(43, 10, many), noise_of(42, 11, many), noise_of(10, 42, many), base.roll(1)):
        correlation = torch.corrcoef(torch.stack([base, other]))[0, 1].item()
        assert abs(correlation) < 5 / math.sqrt(many)


def test_one_token_over_positions_is_exponential_too():
    keys = step_keys(seed_keys([7]).repeat(20_000), np.arange(20_000))
    noise = TokenNoise(16, CPU).exponential(keys).double()
    assert (noise.mean(dim=0) - 1).abs().max() < 5 / math.sqrt(20_000)
    lag = torch.corrcoef(torch.stack([noise[:-1, 3], noise[1:, 3]]))[0, 1].item()
    assert abs(lag) < 5 / math.sqrt(20_000)


def test_a_row_does_not_depend_on_the_other_rows():
    keys = seed_keys(list(range(9)))
    noise = TokenNoise(50, CPU)
    together = noise.exponential(keys)
    for i in range(9):
        assert torch.equal(noise.exponential(keys[i : i + 1])[0], together[i])
