"""Which bytes of a module's parameters have torch's operations written, and which are unwritten?

Records torch's operations in one thread (torch.utils._python_dispatch.TorchDispatchMode). It works
for every device, dtype and way of writing: weight loaders, `copy_`, slices of slices. vLLM counts
its weight loaders' copies in the same way (0.32.0, model_loader/reload/meta.py). Writes by other C
code are not seen. Depends on torch only.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

_aten = torch.ops.aten
_BLANK = {
    _aten.empty.memory_format,
    _aten.empty_strided.default,
    _aten.empty_like.default,
    _aten.empty_permuted.default,
    _aten.new_empty.default,
    _aten.new_empty_strided.default,
}
_COPIES = {_aten.clone.default, _aten._to_copy.default}
_FULL = {_aten.full.default, _aten.full_like.default, _aten.new_full.default}
_FILLS = {_aten.fill_.Scalar, _aten.fill_.Tensor}
# vLLM's placeholder in scales that are not loaded yet (0.32.0: FP8_SCALE_SENTINEL in
# quantization/utils/fp8_utils.py). It does not count as a value.
_NOT_LOADED = torch.finfo(torch.float32).min
# Intervals of bytes: (number of them, 2), [start, stop).
Intervals = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Region:
    """The bytes of a storage that a tensor occupies.

    `run` contiguous bytes at `offset`, repeated for each of `dims`: (count, stride in bytes), the
    largest stride first.
    """

    offset: int
    run: int
    dims: tuple[tuple[int, int], ...] = ()


@dataclass
class Memory:
    """One storage. `born` is what was written before the load, None for all of it."""

    weak: StorageWeakRef
    """Prevents torch from reusing the storage's address for another storage."""
    born: set[Region] | None = None
    loaded: set[Region] = field(default_factory=set)


class Watch:
    """Records writes: use `birth` while the module is created and `load` while it is filled."""

    def __init__(self) -> None:
        self._memories: dict[int, Memory] = {}

    @contextmanager
    def birth(self) -> Iterator[None]:
        """Records, inside the context, which new memory gets no value."""
        with _Birth(self._memories):
            yield

    @contextmanager
    def load(self, module: nn.Module, *, every_operation: bool = True) -> Iterator[None]:
        """Records, inside the context, what is written to the module's parameters.

        Without `every_operation` only what torch's Python functions write: TorchScript and what has
        switched torch functions off are not seen. This costs a fraction (bench/filled.py).
        """
        known = self._memories
        self._memories = {}
        for parameter in module.parameters():
            storage = _storage(parameter)
            if storage is not None:
                number = storage._cdata
                self._memories[number] = known.get(number) or Memory(StorageWeakRef(storage))
        with _Load(self._memories) if every_operation else _LoadedFast(self._memories):
            yield

    def known(self, tensor: torch.Tensor) -> Memory | None:
        """The tensor's memory; None if the load created it, or torch gives no storage for it."""
        storage = _storage(tensor)
        return None if storage is None else self._memories.get(storage._cdata)


class _Mode(TorchDispatchMode):
    def __init__(self, memories: dict[int, Memory]) -> None:
        super().__init__()  # type: ignore[no-untyped-call] # torch's own
        self.memories = memories

    def known(self, tensor: object) -> Memory | None:
        if not isinstance(tensor, torch.Tensor):
            return None
        storage = _storage(tensor)
        return None if storage is None else self.memories.get(storage._cdata)


class _Birth(_Mode):
    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func in _BLANK or (func in _FULL and _says_not_loaded(args[1])):
            self._blank(result)
        elif func in _COPIES:
            # A copy of unwritten memory (to another device or dtype) has no value either.
            source = self.known(args[0])
            if source is not None and source.born == set():
                self._blank(result)
        else:
            for tensor in _written(func, args, kwargs):
                memory = self.known(tensor)
                if memory is None or memory.born is None:
                    continue
                if func in _FILLS and _says_not_loaded(args[1]):
                    continue
                if func is _aten.copy_.default:
                    source = self.known(args[1])
                    if source is not None and source.born == set():
                        continue
                memory.born.add(region(tensor))
        return result

    def _blank(self, tensor: torch.Tensor) -> None:
        storage = _storage(tensor)
        if storage is not None:
            self.memories[storage._cdata] = Memory(StorageWeakRef(storage), born=set())


class _Load(_Mode):
    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if not _written_arguments(func):  # most operations: slices, shapes
            return result
        for tensor in _written(func, args, kwargs):
            self.note(tensor)
        return result

    def note(self, tensor: torch.Tensor) -> None:
        """The load has written to all of `tensor`."""
        memory = self.known(tensor)
        if memory is not None:
            memory.loaded.add(region(tensor))


_Tensor = torch.Tensor
# Certainly write nothing, and make up nearly all calls of a weight loader beside the copies.
_READ_ONLY = frozenset(
    {
        *(_Tensor.__getitem__, _Tensor.narrow, _Tensor.select, _Tensor.view, _Tensor.t),
        *(_Tensor.transpose, _Tensor.permute, _Tensor.unsqueeze, _Tensor.squeeze),
        *(_Tensor.chunk, _Tensor.split, _Tensor.unbind),
        *(_Tensor.size, _Tensor.dim, _Tensor.numel, _Tensor.stride, _Tensor.element_size),
        *(_Tensor.is_contiguous, _Tensor.storage_offset, _Tensor.untyped_storage, _Tensor.detach),
        *(_Tensor.is_floating_point, _Tensor.data_ptr, _Tensor.__len__, _Tensor.nelement),
        *(getattr(_Tensor, name).__get__ for name in ("data", "shape", "dtype", "device", "ndim")),
        *(getattr(_Tensor, name).__get__ for name in ("is_cuda", "is_meta", "layout", "nbytes")),
        *(getattr(_Tensor, name).__get__ for name in ("requires_grad", "is_cpu", "T")),
    }
)


class _LoadedFast(TorchFunctionMode):
    """As _Load, for a fraction of its cost.

    A dispatch mode takes some 20 microseconds for each operation of torch, views included. This one
    sees the calls above them: it notes copies itself, lets through what certainly writes nothing,
    and has _Load follow all others.
    """

    def __init__(self, memories: dict[int, Memory]) -> None:
        super().__init__()
        self._slow = _Load(memories)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _READ_ONLY:
            return func(*args, **kwargs)
        if func is _Tensor.copy_ and type(args[0]).__torch_dispatch__ is _NO_DISPATCH:
            result = func(*args, **kwargs)
            self._slow.note(args[0])
            return result
        with self._slow:
            return func(*args, **kwargs)


# What torch.Tensor and its subclasses have that are no wrappers of other tensors.
_NO_DISPATCH = _Tensor.__torch_dispatch__


def _storage(tensor: torch.Tensor) -> Any:
    try:
        return tensor.untyped_storage()
    except (RuntimeError, NotImplementedError, ValueError):
        return None  # wrapper subclasses (torchao), or parameters without a shape yet


def _says_not_loaded(value: object) -> bool:
    if isinstance(value, torch.Tensor):
        # Reading a value of another device would wait for that device.
        return value.device.type == "cpu" and value.numel() == 1 and bool(value == _NOT_LOADED)
    return value == _NOT_LOADED


# For each operation: positions and names of the arguments that it writes.
_WRITTEN_ARGUMENTS: dict[Any, tuple[tuple[int, str], ...]] = {}


def _written_arguments(func: Any) -> tuple[tuple[int, str], ...]:
    arguments = _WRITTEN_ARGUMENTS.get(func)
    if arguments is None:
        arguments = _WRITTEN_ARGUMENTS[func] = tuple(
            (position, argument.name)
            for position, argument in enumerate(func._schema.arguments)
            if argument.alias_info is not None and argument.alias_info.is_write
        )
    return arguments


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[torch.Tensor]:
    """The tensors that `func` writes to."""
    for position, name in _written_arguments(func):
        value = args[position] if position < len(args) else kwargs.get(name)
        for tensor in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(tensor, torch.Tensor):
                yield tensor


def region(tensor: torch.Tensor) -> Region:
    """The bytes of its storage that the tensor occupies."""
    item = tensor.element_size()
    offset, run = int(tensor.storage_offset()) * item, item
    if tensor.numel() == 0:
        return Region(offset, 0)
    dims: list[tuple[int, int]] = []
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size == 1 or stride == 0:
            continue  # stride 0: an expanded dimension repeats the same bytes
        if not dims and stride * item == run:
            run *= size
        elif dims and stride * item == dims[-1][0] * dims[-1][1]:
            dims[-1] = (dims[-1][0] * size, dims[-1][1])
        else:
            dims.append((size, stride * item))
    return Region(offset, run, tuple(reversed(dims)))


def missing(tensor: torch.Tensor, regions: set[Region]) -> Intervals:
    """The tensor's bytes that are in none of `regions`, as intervals in its storage."""
    own = region(tensor)
    if own in regions or own.run == 0:
        return np.empty((0, 2), np.int64)
    return _difference(_intervals({own}), _intervals(regions))


def _intervals(regions: set[Region]) -> Intervals:
    """The union of `regions` as sorted, disjoint intervals."""
    parts = [_spread(each) for each in _bands_joined(regions) if each.run]
    if not parts:
        return np.empty((0, 2), np.int64)
    found = np.concatenate(parts)
    found = found[np.argsort(found[:, 0], kind="stable")]
    reached = np.maximum.accumulate(found[:, 1])
    first = np.ones(len(found), bool)
    first[1:] = found[1:, 0] > reached[:-1]
    last = np.append(np.flatnonzero(first)[1:] - 1, len(found) - 1)
    return np.stack([found[first, 0], reached[last]], 1)


def _bands_joined(regions: set[Region]) -> Iterable[Region]:
    """The same bytes, with adjacent columns that together form whole rows joined to one region.

    Fused matrices whose parts are adjacent columns (AWQ and GPTQ) would otherwise have one interval
    for each row and part: tens of millions for a large model.
    """
    bands: dict[tuple[int, int, int], list[Region]] = {}
    for each in regions:
        if len(each.dims) == 1 and each.offset % each.dims[0][1] + each.run <= each.dims[0][1]:
            (count, width) = each.dims[0]
            bands.setdefault((each.offset // width, count, width), []).append(each)
        else:
            yield each
    for (row, count, width), parts in bands.items():
        reached = 0
        for part in sorted(parts, key=lambda part: part.offset % width):
            start = part.offset % width
            if start > reached:
                break
            reached = max(reached, start + part.run)
        if reached == width:
            yield Region(row * width, count * width)
        else:
            yield from parts


def _spread(each: Region) -> Intervals:
    starts = np.array([each.offset], np.int64)
    for count, step in each.dims:
        starts = (starts[:, None] + np.arange(count, dtype=np.int64) * step).reshape(-1)
    return np.stack([starts, starts + each.run], 1)


def _difference(own: Intervals, others: Intervals) -> Intervals:
    """The bytes of `own` that are not in `others`; both are sorted and disjoint."""
    edges = np.unique(np.concatenate([own.reshape(-1), others.reshape(-1)]))
    starts, stops = edges[:-1], edges[1:]
    kept = _holds(own, starts) & ~_holds(others, starts)
    return np.stack([starts[kept], stops[kept]], 1)


def _holds(intervals: Intervals, points: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    if not len(intervals):
        return np.zeros(len(points), bool)
    at = np.searchsorted(intervals[:, 0], points, "right") - 1
    held: npt.NDArray[np.bool_] = (at >= 0) & (points < intervals[np.maximum(at, 0), 1])
    return held


def length(intervals: Intervals) -> int:
    """The number of bytes in `intervals`."""
    return int((intervals[:, 1] - intervals[:, 0]).sum())


def first_index(tensor: torch.Tensor, intervals: Intervals) -> list[int]:
    """The tensor's index of its first value in `intervals`."""
    place = int(intervals[0, 0]) // tensor.element_size() - int(tensor.storage_offset())
    strides = tensor.stride()
    index = [0] * tensor.ndim
    for axis in sorted(range(tensor.ndim), key=lambda axis: strides[axis], reverse=True):
        stride = strides[axis]
        if stride and tensor.shape[axis] > 1:
            index[axis] = min(place // stride, tensor.shape[axis] - 1)
            place -= index[axis] * stride
    return index
