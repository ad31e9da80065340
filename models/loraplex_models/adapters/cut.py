"""An adapter's weights as one rank holds them: B is cut with a linear's outputs, A with its inputs.

What it does to the embedding and the head every rank has whole: it is applied to what the ranks have put together.
"""

from dataclasses import replace

from torch import Tensor

from loraplex_models.adapters.refusal import ManifestError
from loraplex_models.adapters.weights import AdapterWeights, ModuleParts
from loraplex_models.checkpoint import take_part
from loraplex_models.cuts import Cut, CutError, RankPart
from loraplex_models.layers.expert_lora import UP, ExpertPairs


def cut_adapter(weights: AdapterWeights, part: RankPart) -> AdapterWeights:
    """Return the rank's part, in memory of its own. The adapter's own ranks are not cut, so any number of them will do.

    Raises ManifestError for modules that cannot be cut.
    """
    if part.size == 1:
        return weights
    return replace(
        weights,
        modules={name: _cut_module(name, a, b, part) for name, (a, b) in weights.modules.items()},
        parts={name: _cut_parts(name, parts, part) for name, parts in weights.parts.items()},
        experts=_cut_experts(weights.experts, part.expert),
    )


def _cut_parts(name: str, parts: ModuleParts, part: RankPart) -> ModuleParts:
    cut = part.linear(name)
    if cut is None:
        return parts
    if cut.inputs is not None:
        # The ranks' outputs are summed: each is scaled, and one brings the biases, the one that has the base's.
        return parts if cut.has_bias else ModuleParts(parts.magnitude)
    magnitude, b_bias, bias = (
        None if vector is None else take_part(vector, cut.outputs)
        for vector in (parts.magnitude, parts.b_bias, parts.bias)
    )
    return ModuleParts(magnitude, b_bias, bias)


def _cut_experts(pairs: ExpertPairs, inner: Cut | None) -> ExpertPairs:
    """Each rank has a run of every expert's inner units: outputs of gate and up, inputs of down."""
    return {
        (layer, linear, part, expert): _cut_pair(a, b, *((inner, None) if linear == UP else (None, inner)))
        for (layer, linear, part, expert), (a, b) in pairs.items()
    }


def _cut_module(name: str, a: Tensor, b: Tensor, part: RankPart) -> tuple[Tensor, Tensor]:
    try:
        cut = part.linear(name)
    except CutError as error:
        raise ManifestError(str(error), "adapter_unsupported") from None
    if cut is None:
        return a, b
    return _cut_pair(a, b, cut.outputs, cut.inputs)


def _cut_pair(a: Tensor, b: Tensor, outputs: Cut | None, inputs: Cut | None) -> tuple[Tensor, Tensor]:
    # B keeps its layout, rank by rank.
    return take_part(a, None, inputs), take_part(b.t(), None, outputs).t()
