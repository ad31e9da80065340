"""From an adapter's own tensors to what the layers apply: what depends on the base's weights is worked out here, once.

DoRA scales each output so that its row of W + s·BA has the length m that the adapter names: the gain is
g = m / ‖W + s·BA‖, and g ⊙ (W x) + bias + g ⊙ s·B(A x) is what the layers get as a gain, a shift, and a B with g in it.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from loraplex_models.adapters.refusal import ManifestError
from loraplex_models.adapters.weights import AdapterWeights, EndParts, ModuleParts
from loraplex_models.layers.lora_extras import EndChange, OutputChange
from loraplex_quant.method import ALL_ROWS

# How many of the base's weights are worked with at a time. On a GPU 16 MiB of float32: no memory is set aside for them
# there. On a CPU all: what is packed is unpacked as a whole.
CHUNK_ELEMENTS = {"cuda": 1 << 22, "cpu": 1 << 40}
# The name of the head's whole bias among `AdapterWeights.sums`.
HEAD_BIAS = "lm_head.bias"
# A copy of the base's matrix may have been rounded to another float type on its way.
COPY_TOLERANCE = 2**-6


class BaseModel(Protocol):
    """What is asked of the base model."""

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        ...

    def base_weight(self, module: str, rows: slice = ALL_ROWS) -> Tensor:
        """Return rows of a linear's weight [out, in], or of lm_head's or embed_tokens' [vocab, hidden]; float32."""
        ...

    def base_bias(self, module: str) -> Tensor | None:
        """Return the bias of a linear or of lm_head, [out] in float32; None where it has none."""
        ...

    @property
    def first_token(self) -> int:
        """The token whose row is the first that this rank has of the embedding and the head."""
        ...


def check_against_base(weights: AdapterWeights, base: BaseModel) -> AdapterWeights:
    """Refuse what only the base's weights can show to be wrong; return the weights without copies of the base's.

    Raises ManifestError.
    """
    for module, parts in weights.parts.items():
        if parts.bias is not None and base.base_bias(module) is None:
            raise ManifestError(
                f"the adapter has a trained bias of {module}, which has none in the base model", "adapter_incompatible"
            )
    for name, end in weights.ends.items():
        is_replaced = end.weight is not None or end.rows is not None
        if is_replaced and name == "lm_head" and base.base_bias(name) is not None:
            raise ManifestError(
                "copies of lm_head and rows of it are not served on a base whose head has a bias: train lm_head with"
                " LoRA",
                "adapter_unsupported",
            )
        if end.base_copy is not None:
            difference, largest = _compare(base, name, end.base_copy)
            if difference > COPY_TOLERANCE * largest:
                raise ManifestError(
                    f"the adapter's copy of the base's {name} is another matrix (differs by up to {difference:g}):"
                    " it was trained on another base, or the matrix was trained too: save it with"
                    f" modules_to_save=['{name}']",
                    "adapter_incompatible",
                )
    ends = {name: replace(end, base_copy=None) for name, end in weights.ends.items() if end.tensors}
    return replace(weights, ends=ends)


def finish_linear(
    base: BaseModel,
    module: str,
    pair: tuple[Tensor, Tensor] | None,
    parts: ModuleParts,
    sums: Mapping[str, Tensor],
) -> tuple[tuple[Tensor, Tensor] | None, OutputChange]:
    """Return the pair with the gain in B, and the change of the base's output; `pair` is None without a product.

    `sums` are those of the adapter's weights. Raises ValueError where DoRA's gain is too large for the pair's dtype.
    """
    bias = base.base_bias(module)
    shift = None if parts.bias is None or bias is None else parts.bias.to(bias.device) - bias
    if parts.magnitude is not None and pair is not None:
        gain, pair = _gain(base, module, pair, parts.magnitude, sums)
        if bias is not None:
            # The base's output has its own bias in it, which is not scaled.
            shift = (0 if shift is None else shift) + (1 - gain) * bias
        return pair, OutputChange(gain - 1, shift)
    if parts.b_bias is not None:
        shift = parts.b_bias if shift is None else shift + parts.b_bias.to(shift.device)
    return pair, OutputChange(None, shift)


def finish_end(base: BaseModel, name: str, end: EndParts, sums: Mapping[str, Tensor]) -> EndChange:
    """Return what an adapter does to the embedding or the head. Raises ValueError as `finish_linear` does."""
    pair, change = end.pair, None
    if end.parts.magnitude is not None and pair is not None:
        gain, pair = _gain(base, name, pair, end.parts.magnitude, sums)
        bias = sums.get(HEAD_BIAS, base.base_bias(name)) if name == "lm_head" else None
        change = OutputChange(gain - 1, None if bias is None else (1 - gain) * bias.to(gain.device))
    elif end.parts.b_bias is not None:
        change = OutputChange(None, end.parts.b_bias)
    a, b = (None, None) if pair is None else pair
    if a is not None and b is not None and name == "embed_tokens":
        a, b = a.t().contiguous(), b.t().contiguous()
    return EndChange(end.weight, end.row_ids, end.rows, a, b, change)


def row_squares(base: BaseModel, module: str, pair: tuple[Tensor, Tensor]) -> Tensor:
    """The sum of squares of each row of W + BA, [out] float32, over what this rank has of the row; B has its rows.

    An embedding's rows of weights are the columns of its matrix, and its A is whole.
    """
    a, b = pair
    if module == "embed_tokens":
        return _column_squares(base, module, pair)
    parts: list[Tensor] = []
    for rows in _row_chunks(base, len(b), a.shape[1]):
        weight = base.base_weight(module, rows)
        product = b[rows].to(weight.device).float() @ a.to(weight.device).float()
        parts.append(product.add_(weight).square_().sum(1))
    return torch.cat(parts)


def _column_squares(base: BaseModel, module: str, pair: tuple[Tensor, Tensor]) -> Tensor:
    a, b = pair
    first = base.first_token
    squares = torch.zeros(len(b), device=base.device)
    for rows in _row_chunks(base, a.shape[1] - first, len(b)):
        weight = base.base_weight(module, rows)  # none where other ranks have them
        tokens = slice(first + rows.start, first + rows.start + len(weight))
        product = a[:, tokens].t().to(weight.device).float() @ b.t().to(weight.device).float()
        squares += product.add_(weight).square_().sum(0)
    return squares


def _gain(
    base: BaseModel, module: str, pair: tuple[Tensor, Tensor], magnitude: Tensor, sums: Mapping[str, Tensor]
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """The gain of each output, and the pair with it in B."""
    a, b = pair
    squares = sums.get(module)
    lengths = (row_squares(base, module, pair) if squares is None else squares).sqrt()
    # A row of zeros, such as a vocabulary is filled up with, gives nothing whatever its gain is.
    gain = torch.where(lengths > 0, magnitude.to(lengths.device) / lengths, 0)
    scaled = (b.float() * gain.to(b.device).unsqueeze(1)).to(b.dtype)
    if not (gain.isfinite().all() and scaled.isfinite().all()):
        raise ValueError(f"DoRA's gains of up to {gain.abs().max():g} do not fit into {b.dtype}")
    return gain, (a, scaled)


def _compare(base: BaseModel, name: str, whole_copy: Tensor) -> tuple[float, float]:
    """How far a copy of the base's matrix is from this rank's rows of it at most, and the largest number of these."""
    difference = largest = 0.0
    first = base.first_token
    for rows in _row_chunks(base, len(whole_copy) - first, whole_copy.shape[1]):
        own = base.base_weight(name, rows)  # none where other ranks have them
        if len(own):
            copy = whole_copy[first + rows.start : first + rows.start + len(own)].to(own.device)
            difference = max(difference, float((copy - own).abs().max()))
            largest = max(largest, float(own.abs().max()))
    return difference, largest


def _row_chunks(base: BaseModel, num_rows: int, row_size: int) -> list[slice]:
    """Runs of rows that are worked with at a time."""
    count = max(1, CHUNK_ELEMENTS[base.device.type] // row_size)
    return [slice(start, min(start + count, num_rows)) for start in range(0, num_rows, count)]
