"""The tensors that an adapter has beside its rank pages, one after the other."""

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from loraplex_models.adapters.slots import PreparedAdapter
from loraplex_models.layers.lora_extras import EndChange, OutputChange

Change = Callable[[Tensor], Tensor]


def map_tensors(adapter: PreparedAdapter, change: Change) -> PreparedAdapter:
    """The same with each tensor changed that is no A or B of a linear; the order depends on what is there only."""
    return replace(
        adapter,
        changes=tuple((linear, part, _output(found, change)) for linear, part, found in adapter.changes),
        embedding=None if adapter.embedding is None else _end(adapter.embedding, change),
        head=None if adapter.head is None else _end(adapter.head, change),
    )


def dense(tensor: Tensor) -> Tensor:
    """The tensor in memory without gaps, row by row or column by column."""
    return tensor if tensor.t().is_contiguous() else tensor.contiguous()


def _output(found: OutputChange, change: Change) -> OutputChange:
    return OutputChange(_maybe(found.gain_minus_one, change), _maybe(found.shift, change))


def _end(end: EndChange, change: Change) -> EndChange:
    return EndChange(
        weight=_maybe(end.weight, change),
        row_ids=_maybe(end.row_ids, change),
        rows=_maybe(end.rows, change),
        a=_maybe(end.a, change),
        b=_maybe(end.b, change),
        change=None if end.change is None else _output(end.change, change),
    )


def _maybe(tensor: Tensor | None, change: Change) -> Tensor | None:
    return None if tensor is None else change(tensor)
