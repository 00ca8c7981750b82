"""A stand-in for torch.cuda: GPUs whose streams work only when a test lets them.

It fakes the calls that our code makes of torch.cuda, and keeps CUDA's rules where breaking them
corrupts data: work on a stream is in order, work on two streams is not, a copy from page-locked
memory reads it when it runs and not when it is asked for, memory that is freed is handed out again
at once to the same stream, and a runtime call makes a context on the calling thread's device.
torch.cuda.stream and torch.cuda.device are torch's own, over faked primitives.
"""

from __future__ import annotations

import ctypes
import random
import threading
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

GIB = 1024**3


@dataclass(eq=False)
class FakeStream:
    """A queue of work. `device` as torch.cuda.Stream has it."""

    cuda: FakeCuda
    device: torch.device
    name: str
    queue: deque[_Work | _Mark | _Wait] = field(default_factory=deque)

    def wait_event(self, event: FakeEvent) -> None:
        self.cuda.put(self, _Wait(event.mark))

    def wait_stream(self, stream: FakeStream) -> None:
        event = FakeEvent()
        event.cuda = self.cuda
        event.record(stream)
        self.wait_event(event)

    def synchronize(self) -> None:
        self.cuda.touch()
        self.cuda.run_all(self)


class FakeEvent:
    """torch.cuda.Event."""

    cuda: FakeCuda

    def __init__(self, *, blocking: bool = False) -> None:
        self.blocking = blocking
        self.mark: _Mark | None = None

    def record(self, stream: FakeStream) -> None:
        self.mark = _Mark(stream)
        self.cuda.put(stream, self.mark)

    def query(self) -> bool:
        self.cuda.touch()
        return self.mark is None or self.mark.reached

    def synchronize(self) -> None:
        self.cuda.touch()
        if self.mark is not None:
            self.cuda.run_to(self.mark)


@dataclass(eq=False)
class _Work:
    """What a kernel or a copy does."""

    do: Callable[[], None]


@dataclass(eq=False)
class _Mark:
    """Where an event was recorded."""

    stream: FakeStream
    reached: bool = False


@dataclass(eq=False)
class _Wait:
    mark: _Mark | None


class FakeCuda:
    """Two GPUs. `eager`: names of streams that work as soon as they may; others when they must.

    With a `seed`, each call lets two streams at random do one thing instead.
    """

    def __init__(
        self, *, free: int = 80 * GIB, eager: tuple[str, ...] = (), seed: int = -1
    ) -> None:
        self.free = free
        self.eager = eager
        self.chance = random.Random(seed) if seed >= 0 else None
        self.lock = threading.RLock()
        self.own = threading.local()
        self.contexts: set[int] = set()
        """Devices on which a context was made."""
        self.streams: list[FakeStream] = []
        self.defaults = [self._stream(index, f"default {index}") for index in range(2)]
        self.blocks: list[Any] = []  # nothing is ever unmapped: what is queued may still use it
        self.unused: dict[tuple[str, int], list[Any]] = {}
        self.allocated = self.most_allocated = 0
        """Bytes on devices."""
        self.locked: dict[int, int] = {}
        """Page-locked memory as torch holds it, used or not: {address: bytes}."""
        self.locked_unused: set[int] = set()
        self.copies: list[tuple[str, str]] = []
        """(name of the thread, name of the stream) of each copy to a device."""

    # What torch.cuda is asked --------------------------------------------------------------------

    def current_device(self) -> int:
        return getattr(self.own, "device", 0)

    def set_device(self, device: Any) -> None:
        self.own.device = _index(device, self)
        self.touch()

    def exchange_device(self, index: int) -> int:
        before = self.current_device()
        if index >= 0:
            self.set_device(index)
        return before

    def maybe_exchange_device(self, index: int) -> int:
        """Back to a device, without making a context there."""
        before = self.current_device()
        if index >= 0:
            self.own.device = index
        return before

    def current_stream(self, device: Any = None) -> FakeStream:
        index = _index(device, self)
        chosen: dict[int, FakeStream] = self.own.__dict__.setdefault("streams", {})
        return chosen.get(index, self.defaults[index])

    def set_stream(self, stream: FakeStream) -> None:
        """As THCPModule_setStream does: the stream's device becomes the thread's."""
        if self.current_device() != stream.device.index:
            self.set_device(stream.device)
        self.own.__dict__.setdefault("streams", {})[stream.device.index] = stream

    def new_stream(self, device: Any = None) -> FakeStream:
        index = _index(device, self)
        self.contexts.add(index)
        return self._stream(index, "copies")

    def new_consumer(self) -> FakeStream:
        """A stream of the second GPU for who takes the tensors."""
        return self._stream(1, "consumer")

    def new_event(self, *, blocking: bool = False) -> FakeEvent:
        event = FakeEvent(blocking=blocking)
        event.cuda = self
        return event

    def synchronize(self, device: Any = None) -> None:
        index = _index(device, self)
        self.contexts.add(index)
        for stream in self.streams:
            if stream.device.index == index:
                self.run_all(stream)

    def mem_get_info(self, device: Any = None) -> tuple[int, int]:
        self.contexts.add(_index(device, self))
        return self.free, 2 * self.free

    def empty_host_cache(self) -> None:
        with self.lock:
            for address in self.locked_unused:
                del self.locked[address]
            self.locked_unused.clear()

    def touch(self) -> None:
        """Any call of the runtime makes a context on the calling thread's device."""
        self.contexts.add(self.current_device())

    # Memory ---------------------------------------------------------------------------------------

    def device_memory(self, count: int, device: torch.device) -> DeviceTensor:
        index = _index(device, self)
        self.contexts.add(index)
        stream = self.current_stream(index)
        key = (f"{id(stream)}", max(count, 1))
        with self.lock:
            free = self.unused.setdefault(key, [])
            block = free.pop() if free else self._block(max(count, 1))
            self.allocated += count
            self.most_allocated = max(self.most_allocated, self.allocated)

        def freed() -> None:
            with self.lock:
                self.unused[key].append(block)
                self.allocated -= count

        made = _owned(block, count, freed).as_subclass(DeviceTensor)
        made.on = (self, index)
        return made

    def page_locked(self, count: int) -> torch.Tensor:
        if not self.contexts:
            self.touch()
        with self.lock:
            block = self._block(max(count, 1))
            address = ctypes.addressof(block)
            self.locked[address] = 1 << (count - 1).bit_length()
        return _owned(block, count, lambda: self.locked_unused.add(address))

    def is_page_locked(self, tensor: torch.Tensor) -> bool:
        at = tensor.data_ptr()
        return any(start <= at < start + size for start, size in list(self.locked.items()))

    # Work -----------------------------------------------------------------------------------------

    def put(self, stream: FakeStream, what: _Work | _Mark | _Wait) -> None:
        """At the end of a stream; then those that may work."""
        self.contexts.add(stream.device.index)
        with self.lock:
            stream.queue.append(what)
            if self.chance is not None:
                for _ in range(2):
                    self._step(self.chance.choice(self.streams))
                return
            eager = [one for one in self.streams if one.name in self.eager]
            while sum(self._step(one) for one in eager):
                pass

    def copy(self, target: DeviceTensor, source: torch.Tensor, *, waits: bool) -> None:
        """cudaMemcpyAsync, to or on the device, on the calling thread's stream there."""
        index = target.on[1]
        stream = self.current_stream(index)
        assert target.is_contiguous()
        assert source.is_contiguous()
        count = target.numel() * target.element_size()
        assert count == source.numel() * source.element_size()
        to, at = target.data_ptr(), source.data_ptr()
        self.copies.append((threading.current_thread().name, stream.name))
        if isinstance(source, DeviceTensor) or self.is_page_locked(source):
            self.put(stream, _Work(lambda: _move(to, at, count)))
        else:  # the driver has taken what stands there before it returns
            taken = ctypes.string_at(at, count)
            self.put(stream, _Work(lambda: _move(to, taken, count)))
        if waits:
            self.run_all(stream)

    def to_host(self, source: DeviceTensor) -> torch.Tensor:
        """A copy that waits, on the calling thread's stream."""
        found = torch.empty(source.numel() * source.element_size(), dtype=torch.uint8)
        to, at = found.data_ptr(), source.data_ptr()
        stream = self.current_stream(source.on[1])
        self.put(stream, _Work(lambda: _move(to, at, len(found))))
        self.run_all(stream)
        return found.view(source.dtype).reshape(source.shape)

    def run_all(self, stream: FakeStream) -> None:
        with self.lock:
            while stream.queue:
                self._force(stream)

    def run_to(self, mark: _Mark) -> None:
        with self.lock:
            while not mark.reached:
                self._force(mark.stream)

    def _force(self, stream: FakeStream) -> None:
        """One thing; what it waits for is done first."""
        first = stream.queue[0]
        if isinstance(first, _Wait) and first.mark is not None:
            self.run_to(first.mark)
        assert self._step(stream)

    def _step(self, stream: FakeStream) -> bool:
        """One thing, where it has not to wait; False where it has, or there is nothing."""
        if not stream.queue:
            return False
        first = stream.queue[0]
        if isinstance(first, _Wait) and first.mark is not None and not first.mark.reached:
            return False
        stream.queue.popleft()
        if isinstance(first, _Work):
            first.do()
        elif isinstance(first, _Mark):
            first.reached = True
        return True

    def _stream(self, index: int, name: str) -> FakeStream:
        made = FakeStream(self, torch.device("cuda", index), name)
        self.streams.append(made)
        return made

    def _block(self, count: int) -> Any:
        block = (ctypes.c_ubyte * count)()
        ctypes.memset(block, 0xEE, count)
        self.blocks.append(block)
        return block


class DeviceTensor(torch.Tensor):
    """Memory on a fake device: only copies and views of it can be made; `kernel` does the rest."""

    on: tuple[FakeCuda, int]

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "__get__":
            name = func.__self__.__name__
        cuda, index = next(a.on for a in args if isinstance(a, DeviceTensor))
        if name == "copy_":
            target, source = args[:2]
            assert isinstance(target, DeviceTensor)
            cuda.copy(target, source, waits=not kwargs.get("non_blocking", False))
            return target
        if name == "cpu":
            return cuda.to_host(args[0])
        if name == "device":
            return torch.device("cuda", index)
        if name == "is_cuda":
            return True
        assert name in _VIEWS, f"{name} is not simulated on the device"
        with torch._C.DisableTorchFunctionSubclass():
            found = func(*args, **kwargs)
        if isinstance(found, torch.Tensor):
            found = found.as_subclass(DeviceTensor)
            found.on = (cuda, index)
        return found


_VIEWS = {
    *("view", "reshape", "__getitem__", "numel", "element_size", "data_ptr", "is_contiguous"),
    *("shape", "dtype", "dim", "__len__", "size"),
}


def install(monkeypatch: pytest.MonkeyPatch, **options: Any) -> FakeCuda:
    """Put a fake in the place of torch.cuda; the calling thread is a rank on GPU 1."""
    cuda = FakeCuda(**options)
    for name, fake in {
        "current_device": cuda.current_device,
        "set_device": cuda.set_device,
        "_exchange_device": cuda.exchange_device,
        "_maybe_exchange_device": cuda.maybe_exchange_device,
        "_get_device_index": lambda device, *_, **__: _index(device, cuda),
        "current_stream": cuda.current_stream,
        "set_stream": cuda.set_stream,
        "Stream": cuda.new_stream,
        "Event": cuda.new_event,
        "synchronize": cuda.synchronize,
        "mem_get_info": cuda.mem_get_info,
    }.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(torch.accelerator, "empty_host_cache", cuda.empty_host_cache)
    real = torch.empty

    def empty(*args: Any, **kwargs: Any) -> torch.Tensor:
        device = torch.device(kwargs.get("device") or "cpu")
        if device.type == "cuda":
            return cuda.device_memory(args[0], device)
        if kwargs.pop("pin_memory", False):
            return cuda.page_locked(args[0])
        return real(*args, **kwargs)

    monkeypatch.setattr(torch, "empty", empty)
    cuda.set_device(1)
    return cuda


def _index(device: Any, cuda: FakeCuda) -> int:
    if isinstance(device, int):
        return device
    index = None if device is None else torch.device(device).index
    return cuda.current_device() if index is None else index


def _owned(block: Any, count: int, freed: Callable[[], object]) -> torch.Tensor:
    """A tensor of a block's memory; `freed` is called when the last view of it is gone."""
    owner = (ctypes.c_ubyte * max(count, 1)).from_buffer(block)
    weakref.finalize(owner, freed)
    return torch.frombuffer(owner, dtype=torch.uint8, count=max(count, 1))[:count]


def _move(to: int, source: Any, count: int) -> None:
    ctypes.memmove(to, source, count)
