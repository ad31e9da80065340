"""How several adapters make one, in numbers and names; no torch. `merge` does it."""

import hashlib
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

    def rank_rows(self, parts: list[tuple[RankRows, ...]], shapes: dict[str, tuple[int, int]]) -> tuple[RankRows, ...]:
        """The kinds of modules that the merged adapter changes, with its rank there.

        parts: those of each part; shapes: input and output size of each kind. A merge that is no product has no low
        rank: its rank is the smaller side of the matrix.
        """
        ranks: dict[str, int] = {}
        for rows in parts:
            for kind, rank in rows:
                ranks[kind] = ranks.get(kind, 0) + rank if self.is_product else min(shapes[kind])
        return tuple(sorted(ranks.items()))
