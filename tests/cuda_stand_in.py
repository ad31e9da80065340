"""A stand-in for torch.cuda without a GPU: the engine's code for GPUs runs on the CPU, from staging to graphs.

`CudaStandIn(monkeypatch)` puts it in place. Tensors made for the device "cuda" are DeviceTensors, Triton's kernels run
in its interpreter, and work runs at once in the order of its launch. What is noticed, by an error:
 - two streams, or a stream and the host, that touch the same memory with no event between them (`cuda_clocks`): a side
   stream that is not joined, a pinned buffer written before its copy is done, a result read before it is there;
 - what a capture refuses: waiting, copies from memory that is not pinned, work on a stream that is not part of it;
 - host tensors given to kernels, or mixed with the device's.
A captured graph keeps the calls and their memory, as CUDA does: `replay` runs them over the same memory, so what was
rebound since is not seen, and results of the capture itself are not numbers. Memory that is reserved and not written
holds what is no number. Without a launch nothing is known of time, and memory is never given out again: what CUDA's
allocator does is not tested here.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from cuda_clocks import Clock, HostWaits, Machine, NotInCapture, Participant, arrives_late, still_unchanged
from cuda_names import put_in_place
from cuda_tensors import EMPTY, WAITS, DeviceTensor, plain, spoil
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map
from triton.runtime.interpreter import InterpretedFunction

# Where tables, and not the tensor, say which bytes a kernel reads.
READ_BY_TABLES = {"pages"}


class _Capture:
    """A graph that is being captured."""

    def __init__(self, mode: str, stream: Participant, before: dict[int, list[Any]]) -> None:
        self.mode = mode
        self.thread = threading.get_ident()
        self.stream = stream
        self.first = stream.count
        self.before = before  # what was known of memory: a capture runs nothing
        self.calls: list[Callable[[], None]] = []
        self.reads: dict[int, Tensor] = {}
        self.writes: dict[int, Tensor] = {}
        self.made: list[Tensor] = []
        self.streams: set[Participant] = {stream}


class CudaStandIn:
    """One GPU. What tests may look at: `num_launches`, `num_replays`, `captures` (calls of each graph)."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.machine = Machine()
        self.num_launches = 0
        self.num_replays = 0
        self.captures: list[int] = []
        self._pinned: dict[int, Tensor | None] = {}  # by the address of the storage; memory of torch stays alive
        self._capture: _Capture | None = None
        self._local = threading.local()
        self._run_kernel = InterpretedFunction.run
        put_in_place(self, monkeypatch)

    @property
    def current(self) -> Participant:
        """The stream that this thread launches on."""
        return getattr(self._local, "stream", self.machine.default)

    @contextmanager
    def on_stream(self, stream: Participant | None) -> Iterator[None]:
        """Launch on that stream."""
        before = self.current
        self._local.stream = stream or before
        try:
            yield
        finally:
            self._local.stream = before

    def finish(self) -> None:
        """Wait for all that is under way, as the end of a process does: checks pinned memory a last time."""
        clock = {copy.stream: copy.count for copy in self.machine.copies}
        self.machine.host_waits(clock)

    # What may be done when.

    def unsafe(self, what: str) -> None:
        """Something that a capture refuses, of its own thread or, by default, of any."""
        capture = self._capture
        if capture is not None and (capture.mode == "global" or capture.thread == threading.get_ident()):
            raise NotInCapture(f"{what} while a graph is captured (mode {capture.mode})")

    def wait(self, what: str, clock: Clock | None = None) -> None:
        """The host waits for a stream; by default for this thread's."""
        with self.machine.lock:
            self.unsafe(what)
            if clock is None and self.machine.sync_is_error:
                raise HostWaits(what)
            self.machine.host_waits(self.current.now() if clock is None else clock)

    def wait_to_read(self, inner: Tensor, what: str) -> None:
        """The host reads memory of the device."""
        with self.machine.lock:
            self.machine.launch(self.current, what, [inner], [])
            self.wait(what)

    def is_pinned(self, tensor: Tensor) -> bool:
        """Whether host memory is pinned."""
        return tensor.untyped_storage().data_ptr() in self._pinned

    # Work.

    def wrapped(self, inner: Tensor, *, is_new: bool) -> DeviceTensor:
        """A tensor of the device over memory that is new, or a view of old memory."""
        if is_new:
            self.machine.allocated(inner)
        return DeviceTensor(inner, self)

    def launch(
        self, what: str, call: Callable[[], None], reads: list[Tensor], writes: list[Tensor], made: list[Tensor]
    ) -> None:
        """Count and record work that has been done; `made`: memory that is new."""
        stream, capture = self.current, self._capture
        for one in made:
            self.machine.allocated(one)
        self.machine.launch(stream, what, reads, [*writes, *made])
        self.num_launches += 1
        if capture is None or threading.get_ident() != capture.thread:
            return
        if not stream.has_seen(capture.stream, capture.first):
            raise NotInCapture(f"{what} on {stream.name}, which is not part of the capture")
        capture.streams.add(stream)
        capture.calls.append(call)
        capture.made += made
        own = {one.untyped_storage().data_ptr() for one in capture.made}
        for known, tensors in ((capture.reads, reads), (capture.writes, writes)):
            known |= {
                _place(one): one for one in tensors if one.untyped_storage().data_ptr() not in own
            }  # what comes from outside: it is touched by each replay

    def operation(self, func: Any, args: Any, kwargs: Any) -> Any:
        """An operation of torch over tensors of the device."""
        with self.machine.lock:
            inner_args, inner_kwargs = plain((args, kwargs))
            inputs = [one for one in tree_flatten((args, kwargs))[0] if isinstance(one, DeviceTensor)]
            if func in WAITS:
                for one in inputs:
                    self.machine.launch(self.current, str(func), [one.inner], [])
                self.wait(str(func))
            results = func(*inner_args, **inner_kwargs)
            schema = func._schema.arguments
            named = {argument.name: value for argument, value in zip(schema, inner_args, strict=False)} | inner_kwargs
            writes = [
                one
                for argument in schema
                if argument.alias_info is not None and argument.alias_info.is_write
                for one in tree_flatten(named.get(argument.name))[0]
                if isinstance(one, Tensor)
            ]
            old = {one.inner.untyped_storage().data_ptr() for one in inputs}
            found = [one for one in tree_flatten(results)[0] if isinstance(one, Tensor)]
            made = [one for one in found if one.untyped_storage().data_ptr() not in old]
            if func in EMPTY:
                for one in made:
                    spoil(one)
                    self.machine.allocated(one)
                if self._is_capturing:
                    assert self._capture is not None
                    self._capture.made += made
            elif made or writes:

                def again() -> None:
                    repeated = func(*inner_args, **inner_kwargs)
                    for target_tensor, one in zip(found, tree_flatten(repeated)[0], strict=True):
                        if target_tensor.untyped_storage().data_ptr() not in old:
                            target_tensor.copy_(one)

                reads = [one.inner for one in inputs]
                self.launch(str(func), again, reads, writes, made)
            by_inner = {id(one.inner): one for one in inputs}

            def wrap(one: Any) -> Any:
                if not isinstance(one, Tensor):
                    return one
                return by_inner[id(one)] if id(one) in by_inner else DeviceTensor(one, self)

            return tree_map(wrap, results)

    def copy(self, to: Tensor, source: Tensor, non_blocking: bool) -> Tensor:
        """`copy_` between the device and host memory, or within the device."""
        with self.machine.lock:
            inner, value = plain((to, source))
            if isinstance(to, DeviceTensor) and isinstance(source, DeviceTensor):
                self.launch("copy_", lambda: _copy(inner, value), [value], [inner], [])
                _copy(inner, value)
            elif isinstance(to, DeviceTensor):
                is_free = self.is_pinned(source) and non_blocking
                if not is_free and source.dim():
                    self.unsafe("a copy from host memory that is not pinned")
                    if not non_blocking:
                        self.wait("a copy from host memory")
                if not source.dim() and self._is_capturing:
                    value = value.clone()  # a number is part of the launch
                self.launch("a copy to the device", lambda: _copy(inner, value), [], [inner], [])
                _copy(inner, value)
                if is_free:
                    self.machine.copy_under_way(self.current, still_unchanged(source))
            else:
                self.machine.launch(self.current, "a copy to the host", [value], [])
                if self.is_pinned(to) and non_blocking:
                    self.unsafe("a copy to the host")
                    self.machine.copy_under_way(self.current, arrives_late(to, value))
                else:
                    self.wait("a copy to the host")
                    to.copy_(value)
            return to

    def to_device(self, host: Tensor, dtype: torch.dtype, non_blocking: bool) -> DeviceTensor:
        """`host.to("cuda")`."""
        with self.machine.lock:
            inner = torch.empty_like(host, dtype=dtype)
            made = self.wrapped(inner, is_new=True)
            if self._is_capturing:
                assert self._capture is not None
                self._capture.made.append(inner)
            self.copy(made, host, non_blocking)
            return made

    def to_host(self, tensor: DeviceTensor, dtype: torch.dtype, non_blocking: bool) -> Tensor:
        """`tensor.to("cpu")`; without waiting it lies in pinned memory."""
        host = torch.empty_like(tensor.inner, dtype=dtype)
        if non_blocking:
            self.pin(host)
        self.copy(host, tensor, non_blocking)
        return host

    def pin(self, host: Tensor) -> Tensor:
        """Pin host memory; it stays alive."""
        with self.machine.lock:
            self.unsafe("memory is pinned")
            self._pinned[host.untyped_storage().data_ptr()] = host
        return host

    def pinned_at(self, address: int) -> None:
        """Host memory that begins there is pinned, and will be as long as it is used."""
        with self.machine.lock:
            self.unsafe("memory is pinned")
            self._pinned[address] = None

    def run_kernel(self, kernel: InterpretedFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        """A Triton kernel: what it writes is found by comparing memory before and after."""
        for position, one in enumerate(args):
            if isinstance(one, Tensor) and not isinstance(one, DeviceTensor):
                raise ValueError(f"pointer argument (at {position}) cannot be accessed from Triton (cpu tensor?)")
        with self.machine.lock:
            inner = plain(args)
            tensors = {
                _place(one): one
                for name, one in zip(kernel.arg_names, inner, strict=False)
                if isinstance(one, Tensor) and name not in READ_BY_TABLES
            }
            before = {place: _octets(one).clone() for place, one in tensors.items()}

            def call() -> None:
                self._run_kernel(kernel, *inner, grid=grid, warmup=warmup, **kwargs)

            call()
            written = {place for place, one in tensors.items() if not torch.equal(_octets(one), before[place])}
            reads = [one for place, one in tensors.items() if place not in written]
            self.launch(kernel.__name__, call, reads, [tensors[place] for place in written], [])

    # Graphs.

    @property
    def _is_capturing(self) -> bool:
        return self._capture is not None and self._capture.thread == threading.get_ident()

    def begin_capture(self, mode: str) -> None:
        """Start to record what this thread launches."""
        with self.machine.lock:
            assert self._capture is None, "one capture at a time"
            stream = self.current
            if stream is self.machine.default:
                raise NotInCapture("the default stream cannot be captured")
            stream.count += 1
            before = {place: list(known) for place, known in self.machine.accesses.items()}
            self._capture = _Capture(mode, stream, before)

    def drop_capture(self) -> None:
        """Give up a capture that has failed."""
        self._capture = None

    def end_capture(self) -> Callable[[], None]:
        """Stop; returns what replays the graph."""
        with self.machine.lock:
            capture, self._capture = self._capture, None
            assert capture is not None
            for stream in capture.streams:
                if not capture.stream.has_seen(stream, stream.count):
                    raise NotInCapture(f"unjoined work: {stream.name} was forked and never joined")
            self.machine.accesses = capture.before
            for one in capture.made:
                self.machine.allocated(one)
                spoil(one)
            self.captures.append(len(capture.calls))

        def replay() -> None:
            with self.machine.lock:
                self.unsafe("a replay")
                self.num_replays += 1
                for call in capture.calls:
                    call()
                made = [one for one in capture.made if one.numel()]
                self.machine.launch(self.current, "a graph", capture.reads.values(), [*capture.writes.values(), *made])

        return replay


def _place(tensor: Tensor) -> int:
    return hash((tensor.data_ptr(), tuple(tensor.shape), tensor.stride()))


def _copy(to: Tensor, value: Tensor) -> None:
    to.copy_(value)


def _octets(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)
