"""`WantedMerge`: several adapters by their ids, as a client or an operator asks for them in place of one."""

import math
from dataclasses import dataclass

from loraplex_models.adapters.merge_recipe import MajoritySign, MergeStrategy
from loraplex_server.errors import InvalidRequest

MAX_MERGED = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class WantedMerge:
    """The adapters by their ids, a weight each, and how they become one. See `MergeRecipe`."""

    ids: tuple[str, ...]
    weights: tuple[float, ...]
    strategy: MergeStrategy = "linear"
    density: float = 1.0
    majority_sign: MajoritySign = "total"

    @property
    def name(self) -> str:
        """What logs and answers call it."""
        parts = "+".join(f"{weight:g}*{adapter_id}" for adapter_id, weight in zip(self.ids, self.weights, strict=True))
        return f"{self.strategy}({parts})"

    def check(self) -> None:
        """Refuse numbers that make no merge. Raises InvalidRequest."""
        if not self.ids:
            raise InvalidRequest("at least one adapter ID must be provided when setting `merged_adapters`")
        if len(self.ids) > MAX_MERGED:
            raise InvalidRequest(
                f"`merged_adapters.ids` has {len(self.ids)} adapters; at most {MAX_MERGED} can be merged"
            )
        if len(self.weights) != len(self.ids):
            raise InvalidRequest(
                f"`merged_adapters` has {len(self.ids)} ids and {len(self.weights)} weights; it needs one weight an id"
            )
        if not all(math.isfinite(weight) for weight in self.weights):
            raise InvalidRequest("`merged_adapters.weights` must be finite numbers")
        if self.strategy != "linear" and not 0 < self.density <= 1:
            raise InvalidRequest(
                f"`merged_adapters.density` must be above 0 and at most 1 for {self.strategy}. Given: {self.density:g}"
            )
