"""An adapter's weights as one rank holds them: B is cut with a linear's outputs, A with its inputs."""

from dataclasses import replace

from torch import Tensor

from loraplex_models.adapters.refusal import ManifestError
from loraplex_models.adapters.weights import AdapterWeights
from loraplex_models.checkpoint import take_part
from loraplex_models.cuts import CutError, RankPart


def cut_adapter(weights: AdapterWeights, part: RankPart) -> AdapterWeights:
    """Return the rank's part, in memory of its own. The adapter's own ranks are not cut, so any number of them will do.

    Raises ManifestError for what cannot be cut.
    """
    if part.size == 1:
        return weights
    if weights.parts or weights.ends:
        module = next(iter(weights.parts or weights.ends))
        raise ManifestError(
            f"the adapter changes {module} by more than a product of A and B (DoRA, a bias, or trained rows), which is "
            f"not served on {part.size} ranks: serve it with --num-shard 1",
            "adapter_unsupported",
        )
    return replace(weights, modules={name: _cut_module(name, a, b, part) for name, (a, b) in weights.modules.items()})


def _cut_module(name: str, a: Tensor, b: Tensor, part: RankPart) -> tuple[Tensor, Tensor]:
    try:
        cut = part.linear(name)
    except CutError as error:
        raise ManifestError(str(error), "adapter_unsupported") from None
    if cut is None:
        return a, b
    # B keeps its layout, rank by rank.
    return take_part(a, None, cut.inputs), take_part(b.t(), None, cut.outputs).t()
