"""Tensors that say they are on a GPU; their numbers lie in the CPU's memory, and operations on them run there.

Every operation on one goes through `DeviceTensor.__torch_dispatch__`: it counts as a launch on the thread's current
stream, is recorded while a graph is captured, and is refused where CUDA would refuse it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map

if TYPE_CHECKING:
    from cuda_stand_in import CudaStandIn

DEVICE = torch.device("cuda", 0)
aten = torch.ops.aten
# Operations whose result the host must know before it can go on.
WAITS = {
    aten._local_scalar_dense.default, aten.item.default, aten.equal.default, aten.nonzero.default,
    aten.is_nonzero.default, aten.masked_select.default, aten._unique2.default, aten.allclose.default,
}  # fmt: skip
# An index in host memory is sent over first: from memory that is not pinned, so the host waits for the copy.
TAKES_HOST_INDEX = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default}
EMPTY = {aten.empty.memory_format, aten.new_empty.default, aten.empty_like.default, aten.empty_strided.default}


class DeviceTensor(Tensor):
    """A tensor on the stand-in's GPU."""

    inner: Tensor
    machine: CudaStandIn

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: Tensor, machine: CudaStandIn) -> DeviceTensor:
        # Whether it belongs to inference mode is for the inner tensor to say.
        with torch.inference_mode(False):
            made = Tensor._make_wrapper_subclass(
                cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype
            )
        made.inner, made.machine = inner, machine
        return made

    device = property(lambda self: DEVICE)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.inner.untyped_storage()

    def tolist(self) -> Any:
        self.machine.wait_to_read(self.inner, "tolist")
        return self.inner.tolist()

    def numpy(self, *, force: bool = False) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    def cpu(self) -> Tensor:
        return self.to("cpu")

    def cuda(self) -> DeviceTensor:
        return self

    def pin_memory(self) -> Tensor:
        raise RuntimeError("cannot pin a tensor of the device")

    def record_stream(self, stream: Any) -> None:
        """Nothing: memory that is given back is not given out again here."""

    def to(self, *arguments: Any, non_blocking: bool = False, copy: bool = False, **settings: Any) -> Tensor:
        device, dtype = target(arguments, settings)
        if device is not None and device.type == "cpu":
            return self.machine.to_host(self, dtype or self.dtype, non_blocking)
        if not copy and dtype in (None, self.dtype):
            return self
        found: Tensor = aten._to_copy.default(self, dtype=dtype or self.dtype)
        return found

    def __repr__(self) -> str:
        return f"DeviceTensor({tuple(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        tensors = [one for one in tree_flatten((args, kwargs))[0] if isinstance(one, Tensor)]
        machine = next(one for one in tensors if isinstance(one, DeviceTensor)).machine
        if func in (aten.copy_.default, aten._copy_from.default):
            return machine.copy(args[0], args[1], bool(args[2]) if len(args) > 2 else kwargs.get("non_blocking", False))
        if func in TAKES_HOST_INDEX:
            if any(not isinstance(one, DeviceTensor) and one.dim() for one in tensors):
                machine.wait("a copy of an index from host memory that is not pinned")
        else:
            for one in tensors:
                if not isinstance(one, DeviceTensor) and one.dim():
                    raise RuntimeError(f"{func}: expected all tensors to be on the same device, one is on the CPU")
        if kwargs.get("device") is not None:
            kwargs["device"] = torch.device("cpu")
        return machine.operation(func, args, kwargs)


def target(arguments: tuple[Any, ...], settings: dict[str, Any]) -> tuple[torch.device | None, torch.dtype | None]:
    """What the arguments of `Tensor.to` say."""
    device, dtype = settings.get("device"), settings.get("dtype")
    for one in arguments:
        if isinstance(one, Tensor):
            device, dtype = one.device, one.dtype
        elif isinstance(one, torch.dtype):
            dtype = one
        elif isinstance(one, str | torch.device):
            device = one
    return None if device is None else torch.device(device), dtype


def plain(tree: Any) -> Any:
    """The same arguments with the CPU's tensors that stand behind those of the device."""
    return tree_map(lambda one: one.inner if isinstance(one, DeviceTensor) else one, tree)


def spoil(tensor: Tensor) -> None:
    """Put what is no number into memory that nothing was written to."""
    if tensor.is_floating_point():
        tensor.fill_(float("nan"))
