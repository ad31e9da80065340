"""Results of a GPU on their way to the host: one buffer that kernels write into, one copy, and an event."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from loraplex_server.engine.staging import Shape, lay_out, torch_dtype


class FetchedResults:
    """Device tensors of given shapes, to be written by kernels, and their numbers on the host."""

    def __init__(self, shapes: Sequence[Shape], device: torch.device) -> None:
        self._layout, end = lay_out(shapes)
        self._on_device = torch.empty(end, dtype=torch.uint8, device=device)
        self.tensors: tuple[Tensor, ...] = tuple(
            self._on_device[start:stop].view(torch_dtype(dtype)).view(shape)
            for start, stop, shape, dtype in self._layout
        )
        self._host = self._on_device
        self._arrived: torch.cuda.Event | None = None

    def fetch(self) -> None:
        """Begin to copy what was launched until now; never waits."""
        if self._on_device.is_cuda:
            # torch gives a pinned buffer out again only when the copies that it knows of are done.
            self._host = torch.empty(len(self._on_device), dtype=torch.uint8, pin_memory=True)
            self._host.copy_(self._on_device, non_blocking=True)
            self._arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._arrived.record()

    def read(self) -> tuple[NDArray[np.generic], ...]:
        """Wait for the copy; the numbers, in the shapes given."""
        if self._arrived is not None:
            self._arrived.synchronize()
        flat = self._host.numpy()
        return tuple(flat[start:stop].view(dtype).reshape(shape) for start, stop, shape, dtype in self._layout)
