"""How several adapters make one, in numbers and names; no torch. `merge` does it."""

import hashlib
from collections.abc import Mapping
from typing import Literal

import msgspec

from loraplex_models.adapters.pages import RankRows

MergeStrategy = Literal["linear", "ties", "dare_linear", "dare_ties"]
MajoritySign = Literal["total", "frequency"]


class MergePart(msgspec.Struct, frozen=True, kw_only=True):
    """One of the adapters: the folder of its files, their digest, and its weight in the sum."""

    path: str
    digest: str
    weight: float


class MergeRecipe(msgspec.Struct, frozen=True, kw_only=True):
    """Several adapters as one.

    `density`: the share of each delta's entries that is kept, above 0 and at most 1 (TIES keeps the largest, DARE draws
    them); `majority_sign`: whether the sum of the entries or the number of their signs elects the sign of a TIES merge.
    """

    parts: tuple[MergePart, ...]
    strategy: MergeStrategy = "linear"
    density: float = 1.0
    majority_sign: MajoritySign = "total"

    @property
    def is_product(self) -> bool:
        """Whether the result is the parts' products side by side: exact, and of the sum of their ranks."""
        return self.strategy == "linear"

    @property
    def digest(self) -> str:
        """Of all that decides the merged weights."""
        hasher = hashlib.sha256(f"merge\n{self.strategy}\n".encode())
        if not self.is_product:
            hasher.update(f"{self.density!r}\n{self.majority_sign}\n".encode())
        for part in self.parts:
            hasher.update(f"{part.digest} {part.weight!r}\n".encode())
        return hasher.hexdigest()

    def rank_rows(
        self, parts: list[tuple[RankRows, ...]], shapes: Mapping[str, tuple[int, int]], num_layers: int
    ) -> tuple[RankRows, ...]:
        """What the merged adapter takes on a device at most, as if it had its highest ranks in all layers.

        parts: the rows of each part; shapes: input and output size of each kind of linear. A merge that is no product
        has no low rank: its rank is the smaller side of the matrix.
        """
        ranks: dict[str, int] = {}
        for rows in parts:
            for kind in {kind for kind, _, _ in rows}:
                highest = max(rank for other, rank, _ in rows if other == kind)
                ranks[kind] = ranks.get(kind, 0) + highest if self.is_product else min(shapes[kind])
        return tuple((kind, rank, num_layers) for kind, rank in sorted(ranks.items()))
