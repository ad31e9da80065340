"""Host memory that a GPU copies from beside its other work."""

import contextlib
import mmap
import weakref
from typing import Any

import torch
from torch import Tensor


def host_memory(num_bytes: int, device: torch.device) -> Tensor:
    """[num_bytes] uint8 that begin with a page of the system, pinned where `device` is a GPU.

    One allocation, pinned in one call: pinning costs the driver milliseconds, in which no kernel can be launched.
    Raises MemoryError where so much cannot be pinned.
    """
    if num_bytes == 0:
        return torch.empty(0, dtype=torch.uint8)
    pages = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # advice that not every kernel takes
        pages.madvise(mmap.MADV_HUGEPAGE)
    memory = torch.frombuffer(pages, dtype=torch.uint8)
    if device.type == "cuda":
        # Not torch's pinned allocator, which rounds up to a power of two and keeps what was given back.
        address, runtime = memory.data_ptr(), torch.cuda.cudart()  # type: ignore[no-untyped-call]
        with torch.cuda.device(device):  # or the driver would make a context on the first GPU
            failed = int(runtime.cudaHostRegister(address, num_bytes, 0)) != 0
        if failed:
            raise MemoryError(f"{num_bytes / 2**20:.0f} MiB of host memory cannot be pinned for the GPU")
        # The pages go after they are unpinned; at the process's end the system does both.
        weakref.finalize(memory, _unpin, runtime, address, pages).atexit = False
    return memory


def _unpin(runtime: Any, address: int, pages: mmap.mmap) -> None:
    runtime.cudaHostUnregister(address)
