"""`merged_adapters`, LoRAX's field for several adapters as one ↔ WantedMerge."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from loraplex_server.errors import InvalidRequest
from loraplex_server.wanted_merge import WantedMerge

Weight = Annotated[float, Field(strict=True)]


class MergedAdapters(BaseModel):
    """Several adapters, merged on their deltas into one."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)

    ids: list[str] = Field(description="the adapters", examples=[["pirate", "json"]])
    weights: list[Weight] = Field([], description="one an adapter", examples=[[0.7, 0.3]])
    merge_strategy: str | None = Field(None, description="linear, ties, dare_linear or dare_ties; linear when absent")
    density: Weight | None = Field(None, description="> 0 and <= 1, the share of entries to keep; not for linear")
    majority_sign_method: str | None = Field(None, description="total or frequency, how ties elects signs")

    def wanted(self) -> WantedMerge:
        """The same without the dialect. Raises InvalidRequest."""
        strategy = (self.merge_strategy or "linear").lower()
        sign = (self.majority_sign_method or "total").lower()
        if strategy not in ("linear", "ties", "dare_linear", "dare_ties"):
            raise InvalidRequest(
                "`merged_adapters.merge_strategy` must be linear, ties, dare_linear or dare_ties. "
                f"Given: {strategy[:50]!r}"
            )
        if sign not in ("total", "frequency"):
            raise InvalidRequest(
                f"`merged_adapters.majority_sign_method` must be total or frequency. Given: {sign[:50]!r}"
            )
        wanted = WantedMerge(
            ids=tuple(self.ids),
            weights=tuple(self.weights),
            strategy=strategy,  # type: ignore[arg-type]  # one of them, as was checked
            density=1.0 if strategy == "linear" else self.density or 0.0,
            majority_sign=sign,  # type: ignore[arg-type]  # likewise
        )
        wanted.check()
        return wanted


def wanted_merge(adapter_id: str | None, merged: MergedAdapters | None) -> WantedMerge | None:
    """The merge that a body asks for, if it does. Raises InvalidRequest."""
    if merged is None:
        return None
    if adapter_id:
        raise InvalidRequest("at most one of `adapter_id` or `merged_adapters` may be provided")
    return merged.wanted()
