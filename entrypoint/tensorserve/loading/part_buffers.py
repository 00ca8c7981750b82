"""In which host memory do a tensor's bytes stand until it is complete, or copied to a GPU?

On a CPU, and where a tensor has to be whole in host memory, in memory of its own. On the way to a
GPU, in parts of `part_bytes`, each in a slot of the ring of `gpu_staging`, from which it is copied
as soon as it is complete.
"""

from __future__ import annotations

from collections import deque
from contextlib import suppress

from tensorserve.format import TensorHeader, TensorRecord
from tensorserve.linux import populate
from tensorserve.loading.gpu_staging import GpuStaging
from tensorserve.loading.pending_tensor import Part, PendingTensor
from tensorserve.loading.tuning import DEFAULTS


class PartBuffers:
    """The memory of the tensors of one load. Thread-safe."""

    def __init__(self, staging: GpuStaging | None, *, whole: bool) -> None:
        """`staging`: the way to a device; None where tensors stay in host memory. `whole`: each
        tensor has to be complete in host memory before it is copied.
        """
        self._staging = staging
        self._whole = whole
        self._chunks_cross_parts = False
        # Ordinary memory of parts, used again: fresh pages cost as much as decryption.
        self._spare: deque[memoryview] = deque()

    def gathers(self, record: TensorRecord) -> bool:
        """Whether a tensor that is copied to a device should come together in host memory first.

        All chunks of a file have one size: where one tensor's do not fit parts, others' do not.
        """
        long = record.length > DEFAULTS.part_bytes
        return self._whole or (self._chunks_cross_parts and long)

    def in_parts(self, tensor: PendingTensor) -> bool:
        """Whether it is copied to the device part by part."""
        return self._staging is not None and not tensor.view

    def header_came(self, tensor: PendingTensor, header: TensorHeader) -> None:
        """Have it come together as a whole, where a chunk of `header` may stand in two parts.

        Call it with the tensor's lock, before bytes are placed under that header.
        """
        if self.in_parts(tensor) and _crosses_parts(header):
            self._chunks_cross_parts = True
            self._gather(tensor)

    def reserve(self, tensor: PendingTensor, start: int, length: int) -> None:
        """Take a slot, where all of a part is at hand: it is decrypted where it is copied from.

        May wait for a slot, so it is called without the tensor's lock: others need that to free
        their slots. Raises RuntimeError once the load has ended.
        """
        if not self.in_parts(tensor) or not _is_part(tensor.record, start, start + length):
            return
        assert self._staging is not None
        slot = self._staging.take()
        with tensor.lock:
            part = Part(slot.numpy().data[:length], slot, length)
            tensor.parts[start // DEFAULTS.part_bytes] = part

    def place(self, tensor: PendingTensor, start: int, stop: int) -> memoryview:
        """The host memory of bytes [start, stop), which are within one part."""
        if not self.in_parts(tensor):
            return tensor.view[start:stop]
        number, within = divmod(start, DEFAULTS.part_bytes)
        with tensor.lock:
            if number not in tensor.parts:
                begin = start - within
                length = min(DEFAULTS.part_bytes, tensor.record.length - begin)
                tensor.parts[number] = self._new_part(length)
            part = tensor.parts[number]
        return part.memory[within : within + stop - start]

    def fresh_place(self, tensor: PendingTensor, start: int, stop: int) -> memoryview:
        """`place` of bytes that are written for the first time, with its pages."""
        place = self.place(tensor, start, stop)
        if not self.in_parts(tensor):  # a slot is page-locked, and has its pages
            populate(place)
        return place

    def write(self, tensor: PendingTensor, start: int, data: memoryview) -> None:
        """Copy `data`, within one part, to bytes [start, start + its length)."""
        if len(data):
            self.fresh_place(tensor, start, start + len(data))[:] = data

    def filled(self, tensor: PendingTensor, start: int, stop: int) -> None:
        """Bytes [start, stop), within one part, are plain text in their place: a part that is
        complete goes to the device.
        """
        if not self.in_parts(tensor):
            return
        number = start // DEFAULTS.part_bytes
        with tensor.lock:
            part = tensor.parts[number]
            part.bytes_left -= stop - start
            if part.bytes_left:
                return
            del tensor.parts[number]
        self._send(tensor, number * DEFAULTS.part_bytes, part)

    def complete(self, tensor: PendingTensor) -> None:
        """All of a tensor is in its place: what is in host memory as a whole goes to the device."""
        if self._staging is not None and tensor.staged:
            assert tensor.memory is not None
            self._staging.send_all(tensor.view, tensor.memory)
            tensor.copied = self._staging.sent()

    def _new_part(self, length: int) -> Part:
        """For a part that arrives in several ranges."""
        assert self._staging is not None
        slot = self._staging.take_early()
        if slot is not None:
            return Part(slot.numpy().data[:length], slot, length)
        if length == DEFAULTS.part_bytes:
            with suppress(IndexError):
                return Part(self._spare.pop(), None, length)
        memory = memoryview(bytearray(length))
        populate(memory)
        return Part(memory, None, length)

    def _gather(self, tensor: PendingTensor) -> None:
        view = memoryview(bytearray(tensor.record.length))
        for start, stop in tensor.early:
            view[start:stop] = self.place(tensor, start, stop)
        assert self._staging is not None
        for part in tensor.parts.values():
            if part.slot is not None:
                self._staging.give_back(part.slot)
        tensor.parts.clear()
        tensor.view = view

    def _send(self, tensor: PendingTensor, begin: int, part: Part) -> None:
        assert self._staging is not None
        slot, length = part.slot, len(part.memory)
        if slot is None:
            slot = self._staging.take()
            slot.numpy().data[:length] = part.memory
            if length == DEFAULTS.part_bytes:
                self._spare.append(part.memory)
        assert tensor.memory is not None
        self._staging.send(slot, tensor.memory[begin : begin + length])


def _is_part(record: TensorRecord, start: int, stop: int) -> bool:
    """Whether bytes [start, stop) of a tensor are exactly one part of it."""
    size = DEFAULTS.part_bytes
    return start % size == 0 and stop == min(start + size, record.length)


def _crosses_parts(header: TensorHeader) -> bool:
    """Whether a chunk may stand in two parts."""
    chunks, length = header.chunks, header.record.length
    if chunks is None or length <= DEFAULTS.part_bytes:
        return False
    return bool(DEFAULTS.part_bytes % (length if chunks.count == 1 else chunks.chunk_size))
