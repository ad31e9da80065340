"""Work on a side stream of a GPU, under other work that needs the same input."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor

_side_streams: dict[torch.device, torch.cuda.Stream] = {}


@contextmanager
def beside(x: Tensor) -> Iterator[AbstractContextManager[object]]:
    """Give a context whose work runs beside that which follows it in this block; both are done at the block's end.

    The inner context's work sees all that was launched before, `x` among it. Memory that is reserved inside and used
    after the block belongs to the main stream, since both streams meet at the end. On a CPU all runs in order.
    """
    if not x.is_cuda:
        yield nullcontext()
        return
    main, side = torch.cuda.current_stream(x.device), side_stream(x.device)
    side.wait_stream(main)
    yield torch.cuda.stream(side)
    main.wait_stream(side)


def new_stream(device: torch.device) -> torch.cuda.Stream:
    """A stream of its own on a GPU."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def side_stream(device: torch.device) -> torch.cuda.Stream:
    """The side stream of a device: one, so that captured graphs and steps without a graph use the same."""
    if device not in _side_streams:
        _side_streams[device] = new_stream(device)
    return _side_streams[device]
