"""Step inputs for a GPU: all of a step's numbers in one pinned buffer and one copy, at addresses that stay the same."""

from collections import deque
from collections.abc import Sequence
from math import prod

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# Pinned buffers in turn: one is written while copies from the others may still be under way.
NUM_BUFFERS = 3
ALIGNMENT = 16


Shape = tuple[tuple[int, ...], type[np.generic]]
Layout = list[tuple[int, int, tuple[int, ...], np.dtype[np.generic]]]


def lay_out(shapes: Sequence[Shape]) -> tuple[Layout, int]:
    """Where arrays of these shapes begin and end, one after the other in a buffer, and how many bytes it has."""
    layout: Layout = []
    end = 0
    for shape, kind in shapes:
        dtype = np.dtype(kind)
        num_bytes = prod(shape) * dtype.itemsize
        layout.append((end, end + num_bytes, shape, dtype))
        end = -(-(end + num_bytes) // ALIGNMENT) * ALIGNMENT
    return layout, end


class StagedInputs:
    """Device tensors of given shapes and what brings numbers into them."""

    def __init__(self, shapes: Sequence[Shape], device: torch.device) -> None:
        """Lay the tensors out one after the other in one device buffer."""
        self._is_gpu = device.type == "cuda"
        self._layout, end = lay_out(shapes)
        self.num_bytes = end
        self._on_device = torch.zeros(end, dtype=torch.uint8, device=device)
        self.tensors: tuple[Tensor, ...] = tuple(
            self._on_device[start:stop].view(torch_dtype(dtype)).view(shape)
            for start, stop, shape, dtype in self._layout
        )
        self._buffers: deque[tuple[Tensor, tuple[NDArray[np.generic], ...], torch.cuda.Event | None]] = deque()
        for _ in range(NUM_BUFFERS if self._is_gpu else 1):
            host = torch.zeros(end, dtype=torch.uint8, pin_memory=self._is_gpu)
            views = tuple(
                host.numpy()[start:stop].view(dtype).reshape(shape) for start, stop, shape, dtype in self._layout
            )
            event = torch.cuda.Event() if self._is_gpu else None  # type: ignore[no-untyped-call]
            self._buffers.append((host, views, event))

    def write(self) -> tuple[NDArray[np.generic], ...]:
        """Arrays to be filled for the next `send`; they hold what an earlier step has left."""
        _, views, event = self._buffers[0]
        if event is not None:
            event.synchronize()  # its copy was launched NUM_BUFFERS steps ago: there is nothing to wait for
        return views

    def send(self) -> None:
        """Copy what was written; work launched from now on sees it."""
        host, _, event = self._buffers[0]
        self._on_device.copy_(host, non_blocking=True)
        if event is not None:
            event.record()
        self._buffers.rotate(-1)


def send_arrays(arrays: Sequence[NDArray[np.generic]], device: torch.device) -> tuple[Tensor, ...]:
    """The arrays on the device, by one copy; for steps whose shapes come but once."""
    staged = [np.ascontiguousarray(array) for array in arrays]
    starts = np.cumsum([0, *(-(-array.nbytes // ALIGNMENT) * ALIGNMENT for array in staged)])
    host = torch.empty(int(starts[-1]), dtype=torch.uint8, pin_memory=device.type == "cuda")
    flat = host.numpy()
    for start, array in zip(starts, staged, strict=False):
        flat[start : start + array.nbytes] = array.reshape(-1).view(np.uint8)
    # torch keeps pinned memory until the copies that read it are done.
    there = host.to(device, non_blocking=True)
    return tuple(
        there[start : start + array.nbytes].view(torch_dtype(array.dtype)).view(array.shape)
        for start, array in zip(starts.tolist(), staged, strict=False)
    )


def torch_dtype(dtype: np.dtype[np.generic]) -> torch.dtype:
    """The type of tensors with such numbers."""
    return {"int64": torch.int64, "int32": torch.int32, "float32": torch.float32}[dtype.name]
