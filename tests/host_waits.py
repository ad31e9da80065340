"""Finds code that makes the host wait for a GPU, even where there is none.

Without one, what a launch may do is listed, and all else raises; on one, torch raises where it waits.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.interpreter import GridExecutor
from triton_interpreter import IS_INTERPRETED

# Launches on the current stream, and views. Not among them: copies from the device, `nonzero`, indexing by masks or by
# lists (they travel in a copy that is waited for), reductions that are read.
LAUNCHES = {
    "aten.alias", "aten.constant_pad_nd", "aten.copy_", "aten.detach", "aten.empty", "aten.fill_", "aten.index_copy_",
    "aten.ones_like", "aten.scatter_add_", "aten.select", "aten.slice", "aten.view", "aten.zero_",
}  # fmt: skip
READS = ("__array__", "__bool__", "__float__", "__index__", "__int__", "cpu", "cuda", "item", "numpy", "tolist")
MAKERS = ("as_tensor", "from_numpy", "tensor")


class HostWait(AssertionError):
    """Something that would wait for the device."""


class _OnlyLaunches(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if str(func.overloadpacket) not in LAUNCHES:
            raise HostWait(str(func))
        return func(*args, **(kwargs or {}))


class Watch:
    """Watches code that should only launch; `pause` is for what stands in for the device or its copies."""

    def __init__(self) -> None:
        self._is_on = False
        self.num_launches = 0

    @contextlib.contextmanager
    def launches_only(self) -> Iterator[None]:
        """Raise at whatever waits, or would wait, for a GPU."""
        if IS_INTERPRETED:
            with self._switched(True), _OnlyLaunches():
                yield
            return
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Let anything pass."""
        with self._switched(False), torch.utils._python_dispatch._disable_current_modes():
            yield

    @contextlib.contextmanager
    def _switched(self, is_on: bool) -> Iterator[None]:
        before, self._is_on = self._is_on, is_on
        try:
            yield
        finally:
            self._is_on = before

    def guard(self, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> None:
        """Have a function of torch raise while only launches are allowed."""
        function = getattr(owner, name)

        def guarded(*args: Any, **kwargs: Any) -> Any:
            if self._is_on:
                raise HostWait(f"{owner.__name__}.{name}")
            return function(*args, **kwargs)

        monkeypatch.setattr(owner, name, guarded)

    def exempt(self, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, *, is_launch: bool = False) -> None:
        """Let a function do as it likes; with `is_launch` it counts."""
        function = getattr(owner, name)

        def exempted(*args: Any, **kwargs: Any) -> Any:
            self.num_launches += is_launch
            with self.pause():
                return function(*args, **kwargs)

        monkeypatch.setattr(owner, name, exempted)


def watch_host_waits(monkeypatch: pytest.MonkeyPatch) -> Watch:
    """Watch torch; kernels in the interpreter are exempt."""
    watch = Watch()
    for name in READS:
        watch.guard(monkeypatch, torch.Tensor, name)
    for name in MAKERS:
        watch.guard(monkeypatch, torch, name)
    watch.exempt(monkeypatch, GridExecutor, "__call__", is_launch=True)
    return watch
