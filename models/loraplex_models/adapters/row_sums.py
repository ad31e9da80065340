"""What DoRA needs of rows that no rank has whole: each rank takes its share, and all ranks' shares are added up.

The length of a row of W + BA is the root of a sum of squares, and a rank with some of the row's columns has some of the
squares. They are taken from the base as each rank serves it, so quantised parts count as they were rounded.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from loraplex_models.adapters.finish import HEAD_BIAS, BaseModel, row_squares
from loraplex_models.adapters.weights import AdapterWeights
from loraplex_models.cuts import RankPart
from loraplex_models.parallel import ParallelGroup


@dataclass(frozen=True, slots=True)
class UnfinishedWeights:
    """A rank's part of an adapter, and its shares of the sums that the part needs; in one order on every rank."""

    weights: AdapterWeights
    shares: Mapping[str, Tensor]  # float32, on the CPU; see `AdapterWeights.sums`

    @property
    def digest(self) -> str:
        """That of the adapter."""
        return self.weights.digest

    def finished(self, group: ParallelGroup) -> AdapterWeights:
        """Return the part with the sums over all ranks, each of which calls this at the same time."""
        sizes = [len(share) for share in self.shares.values()]
        sums = group.all_gather(torch.cat(list(self.shares.values()))).view(group.size, -1).sum(0)
        return replace(self.weights, sums=dict(zip(self.shares, torch.split(sums, sizes), strict=True)))


def take_shares(weights: AdapterWeights, base: BaseModel, part: RankPart) -> AdapterWeights | UnfinishedWeights:
    """Return the rank's part of an adapter, as `cut_adapter` gave it, ready or with shares of what it needs."""
    if part.size == 1:
        return weights
    shares: dict[str, Tensor] = {}
    for module, parts in weights.parts.items():
        cut = part.linear(module)
        if parts.magnitude is not None and cut is not None and cut.inputs is not None:
            shares[module] = row_squares(base, module, weights.modules[module]).cpu()
    for name, end in weights.ends.items():
        if end.parts.magnitude is None or end.pair is None:
            continue
        if name == "embed_tokens":
            shares[name] = row_squares(base, name, end.pair).cpu()
            continue
        # Rows of the head are whole where they are, but every rank needs all of them.
        run = slice(*part.vocab)
        a, b = end.pair
        shares[name] = _in_place(row_squares(base, name, (a, b[run])), run, len(b))
        bias = base.base_bias(name)
        if bias is not None:
            shares[HEAD_BIAS] = _in_place(bias, run, len(b))
    return UnfinishedWeights(weights, shares) if shares else weights


def _in_place(own: Tensor, run: slice, size: int) -> Tensor:
    """A rank's run of a vector, with zeros for what others have."""
    whole = torch.zeros(size)
    whole[run] = own.cpu()
    return whole
