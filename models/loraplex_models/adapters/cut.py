"""An adapter's weights as one rank holds them: B is cut with a linear's outputs, A with its inputs.

What it does to the embedding and the head every rank has whole: it is applied to what the ranks have put together.
"""

from dataclasses import replace

from torch import Tensor

from loraplex_models.adapters.refusal import ManifestError
from loraplex_models.adapters.weights import AdapterWeights, ModuleParts
from loraplex_models.checkpoint import take_part
from loraplex_models.cuts import CutError, RankPart


def cut_adapter(weights: AdapterWeights, part: RankPart) -> AdapterWeights:
    """Return the rank's part, in memory of its own. The adapter's own ranks are not cut, so any number of them will do.

    `check_adapter` has refused what no rank could do alone. Raises ManifestError for modules that cannot be cut.
    """
    if part.size == 1:
        return weights
    if weights.experts:
        raise ManifestError(
            f"the adapter changes experts, which is not served on {part.size} ranks: serve it with --num-shard 1",
            "adapter_unsupported",
        )
    return replace(
        weights,
        modules={name: _cut_module(name, a, b, part) for name, (a, b) in weights.modules.items()},
        parts={name: _cut_parts(name, parts, part) for name, parts in weights.parts.items()},
    )


def _cut_parts(name: str, parts: ModuleParts, part: RankPart) -> ModuleParts:
    cut = part.linear(name)
    if cut is None:
        return parts
    if cut.inputs is not None:
        # The ranks' outputs are summed: one of them brings the biases, the one that has the base's.
        return parts if cut.has_bias else ModuleParts()
    magnitude, b_bias, bias = (
        None if vector is None else take_part(vector, cut.outputs)
        for vector in (parts.magnitude, parts.b_bias, parts.bias)
    )
    return ModuleParts(magnitude, b_bias, bias)


def _cut_module(name: str, a: Tensor, b: Tensor, part: RankPart) -> tuple[Tensor, Tensor]:
    try:
        cut = part.linear(name)
    except CutError as error:
        raise ManifestError(str(error), "adapter_unsupported") from None
    if cut is None:
        return a, b
    # B keeps its layout, rank by rank.
    return take_part(a, None, cut.inputs), take_part(b.t(), None, cut.outputs).t()
