"""The names of torch.cuda, and those by which tensors come to a device, with a stand-in behind them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from cuda_clocks import Clock, Participant
from cuda_tensors import DEVICE, DeviceTensor, spoil, target
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction

if TYPE_CHECKING:
    from cuda_stand_in import CudaStandIn

FACTORIES = ("empty", "zeros", "ones", "full", "arange", "tensor", "rand", "randn", "randint", "randperm", "as_tensor")
TOTAL_BYTES = 1 << 30


def put_in_place(cuda: CudaStandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put the stand-in behind torch's names."""
    machine = cuda.machine

    class Event:
        def __init__(self, enable_timing: bool = False, **_: Any) -> None:
            self.clock: Clock = {}

        def record(self, stream: Stream | None = None) -> None:
            self.clock = (stream.participant if stream else cuda.current).now()

        def wait(self, stream: Stream | None = None) -> None:
            (stream.participant if stream else cuda.current).see(self.clock)

        def synchronize(self) -> None:
            cuda.wait("an event is waited for", self.clock)

        def query(self) -> bool:
            cuda.wait("an event is asked for", self.clock)
            return True

        def elapsed_time(self, end: Event) -> float:
            return 1.0

    class Stream:
        def __init__(self, device: Any = None, priority: int = 0, participant: Participant | None = None) -> None:
            self.participant = participant or Participant(f"stream {next(machine.names)}")
            self.device = DEVICE

        def record_event(self, event: Event | None = None) -> Event:
            event = event or Event()
            event.record(self)
            return event

        def wait_event(self, event: Event) -> None:
            event.wait(self)

        def wait_stream(self, stream: Stream) -> None:
            self.wait_event(stream.record_event())

        def synchronize(self) -> None:
            cuda.wait("a stream is waited for", self.participant.now())

        def query(self) -> bool:
            self.synchronize()
            return True

    class Graph:
        def __init__(self, keep_graph: bool = False) -> None:
            self.replay: Callable[[], None] = lambda: pytest.fail("a graph is replayed that was not captured")

        def reset(self) -> None:
            self.replay = lambda: pytest.fail("a graph is replayed that was reset")

    @contextmanager
    def graph(
        cuda_graph: Graph, pool: Any = None, stream: Stream | None = None, capture_error_mode: str = "global"
    ) -> Iterator[None]:
        synchronize()
        with cuda.on_stream(stream.participant if stream else capture_stream.participant):
            cuda.begin_capture(capture_error_mode)
            try:
                yield
            except BaseException:
                cuda.drop_capture()
                raise
            cuda_graph.replay = cuda.end_capture()

    def synchronize(device: Any = None) -> None:
        clock = {one.stream: one.count for known in machine.accesses.values() for one in known}
        clock |= {copy.stream: max(copy.count, clock.get(copy.stream, 0)) for copy in machine.copies}
        cuda.wait("the device is waited for", clock | {cuda.current: cuda.current.count})

    @contextmanager
    def stream_context(stream: Stream | None) -> Iterator[None]:
        with cuda.on_stream(stream.participant if stream else None):
            yield

    def set_sync_debug_mode(mode: str | int) -> None:
        machine.sync_is_error = mode in ("error", 2)

    def register(address: int, num_bytes: int, flags: int) -> int:
        cuda.pinned_at(address)
        return 0

    capture_stream = Stream()
    names: dict[str, Any] = {
        "Event": Event, "Stream": Stream, "CUDAGraph": Graph, "graph": graph, "synchronize": synchronize,
        "stream": stream_context, "set_sync_debug_mode": set_sync_debug_mode,
        "current_stream": lambda device=None: Stream(participant=cuda.current),
        "default_stream": lambda device=None: Stream(participant=machine.default),
        "graph_pool_handle": lambda: (0, 1), "is_available": lambda: True, "device_count": lambda: 1,
        "current_device": lambda: 0, "set_device": lambda device: None,
        "get_device_name": lambda device=None: "stand-in",
        "is_current_stream_capturing": lambda: cuda._is_capturing, "empty_cache": lambda: cuda.unsafe("empty_cache"),
        "mem_get_info": lambda device=None: (TOTAL_BYTES - machine.allocated_bytes, TOTAL_BYTES),
        "memory_allocated": lambda device=None: machine.allocated_bytes,
        "max_memory_allocated": lambda device=None: machine.allocated_bytes,
        "memory_reserved": lambda device=None: machine.allocated_bytes,
        "max_memory_reserved": lambda device=None: machine.allocated_bytes,
        "reset_peak_memory_stats": lambda device=None: None, "device": lambda device: nullcontext(),
        "cudart": lambda: SimpleNamespace(cudaHostRegister=register, cudaHostUnregister=lambda address: 0),
        "get_device_properties": lambda device=None: SimpleNamespace(
            total_memory=TOTAL_BYTES, shared_memory_per_block_optin=227 * 1024
        ),
    }  # fmt: skip
    for name, value in names.items():
        monkeypatch.setattr(torch.cuda, name, value)

    def factory(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def made(*arguments: Any, device: Any = None, pin_memory: bool = False, **settings: Any) -> Tensor:
            if device is None or torch.device(device).type != "cuda":
                found = make(*arguments, device=device, **settings)
                return cuda.pin(found) if pin_memory else found
            value = make(*arguments, **settings)
            if make is torch_empty:
                spoil(value)
                return cuda.wrapped(value, is_new=True)
            if make.__name__ in ("tensor", "as_tensor") and value.dim():
                return cuda.to_device(value, value.dtype, False)
            with machine.lock:
                cuda.launch(make.__name__, lambda: _fill(value, make(*arguments, **settings)), [], [], [value])
                return DeviceTensor(value, cuda)

        return made

    torch_empty = torch.empty
    for name in FACTORIES:
        monkeypatch.setattr(torch, name, factory(getattr(torch, name)))
    generator = torch.Generator
    monkeypatch.setattr(torch, "Generator", lambda device=None: generator())
    torch_to, torch_is_pinned = Tensor.to, Tensor.is_pinned

    def to(tensor: Tensor, *arguments: Any, non_blocking: bool = False, **settings: Any) -> Tensor:
        device, dtype = target(arguments, settings)
        if device is None or device.type != "cuda":
            return torch_to(tensor, *arguments, non_blocking=non_blocking, **settings)
        return cuda.to_device(tensor, dtype or tensor.dtype, non_blocking)

    monkeypatch.setattr(Tensor, "to", to)
    monkeypatch.setattr(Tensor, "cuda", lambda tensor: cuda.to_device(tensor, tensor.dtype, False))
    monkeypatch.setattr(Tensor, "pin_memory", lambda tensor: cuda.pin(tensor.clone()))
    monkeypatch.setattr(
        Tensor, "is_pinned", lambda tensor, device=None: cuda.is_pinned(tensor) or torch_is_pinned(tensor)
    )

    def run(kernel: InterpretedFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        if any(isinstance(one, DeviceTensor) for one in args):
            cuda.run_kernel(kernel, *args, grid=grid, warmup=warmup, **kwargs)
        else:
            cuda._run_kernel(kernel, *args, grid=grid, warmup=warmup, **kwargs)

    monkeypatch.setattr(InterpretedFunction, "run", run)


def _fill(tensor: Tensor, value: Tensor) -> None:
    tensor.copy_(value)
