"""What is asked of a server: fixed prompts, and which adapter each request names."""

import random
from dataclasses import dataclass

DISTRIBUTIONS = ("distinct", "identical", "uniform", "skewed")

_PROMPTS = (
    "Chapter {number}. The ship left the harbour early in the morning, and the crew",
    "Note {number}. A short history of the bicycle: the first machines with two wheels",
    "Letter {number}. Dear friend, today I walked through the old town, where I saw",
    "Lesson {number}. How bread is made: first the flour is mixed with water and then",
)


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt for one adapter; the base model where there is none."""

    prompt: str
    adapter: str | None


def requests_for(
    adapters: list[str | None], distribution: str, count: int, first_number: int, seed: int = 0
) -> list[Request]:
    """`count` requests over the adapters, the same for the same arguments.

    distinct: in turn; identical: all for the first; uniform: at random; skewed: Zipf with exponent 1, the first
    most often. Prompts are numbered at their head from `first_number`, so no two share a block of a prefix cache.
    """
    chosen = _choose(adapters, distribution, count, random.Random(seed))
    return [
        Request(_PROMPTS[i % len(_PROMPTS)].format(number=first_number + i), adapter)
        for i, adapter in enumerate(chosen)
    ]


def _choose(adapters: list[str | None], distribution: str, count: int, chance: random.Random) -> list[str | None]:
    match distribution:
        case "distinct":
            return [adapters[i % len(adapters)] for i in range(count)]
        case "identical":
            return [adapters[0]] * count
        case "uniform":
            return chance.choices(adapters, k=count)
        case "skewed":
            return chance.choices(adapters, weights=zipf_weights(len(adapters)), k=count)
    raise ValueError(f"no such distribution: {distribution}")


def zipf_weights(count: int) -> list[float]:
    """How often each of `count` is chosen, relative to the first: exponent 1."""
    return [1 / (rank + 1) for rank in range(count)]
