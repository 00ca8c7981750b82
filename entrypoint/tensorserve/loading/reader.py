"""How one job is done: its bytes received, and opened where they belong.

From a file the thread that received a part opens it, straight out of the processor's cache. Behind
a network there are more connections than processors: there `open_what_comes` does it, in one thread
a processor.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from functools import partial
from queue import SimpleQueue

from tensorserve.format import TensorRecord
from tensorserve.linux import populate
from tensorserve.loading.memory import Buffers
from tensorserve.loading.opener import Opener, Pending
from tensorserve.loading.progress import LoadProgress
from tensorserve.loading.schedule import BATCH_BYTES, PART_BYTES, Job, Schedule
from tensorserve.sources import Source

# A part that takes this long while another connection has nothing to do is read a second time.
_DOUBLE_SECONDS = 0.5
# For a header that has not come yet, before others get their turn.
_HEADER_SECONDS = 0.02
# Small tensors read together, and their headers.
_BATCH = BATCH_BYTES + 256 * 1024


class Reader:
    """Does jobs. Thread-safe. `finished` is called with each tensor when its last byte is open."""

    def __init__(
        self,
        source: Source,
        opener: Opener,
        schedule: Schedule[Pending],
        progress: LoadProgress,
        *,
        direct: bool,
        memory_limit: int,
        finished: Callable[[Pending], None],
    ) -> None:
        """`direct`: large tensors are received where they belong, since nothing is to be opened.

        `memory_limit`: bytes for what is received and not opened yet.
        """
        self._source = source
        self._opener = opener
        self._schedule = schedule
        self._progress = progress
        self._direct = direct
        self._finished = finished
        self.apart = source.remote and not direct
        self.part_buffers = max(4, memory_limit * 5 // 6 // PART_BYTES)
        self._buffers = Buffers(PART_BYTES, self.part_buffers)
        self._batch_buffers = Buffers(_BATCH, max(2, memory_limit // 6 // _BATCH))
        self._received: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._stopped = threading.Event()

    def open_what_comes(self) -> None:
        """Opens what all connections receive, until `stop`."""
        while (opening := self._received.get()) is not None:
            opening()
        self._received.put(None)  # for the next thread

    def stop(self) -> None:
        """Let nobody wait any more."""
        self._stopped.set()
        self._buffers.close()
        self._batch_buffers.close()
        self._received.put(None)

    def do(self, job: Job[Pending]) -> None:
        if job.batch:
            self._do_batch(job)
        else:
            self._do_parts(job)

    def _do_batch(self, job: Job[Pending]) -> None:
        """Small tensors, whole, in one read."""
        first, last = job.tensors[0].record, job.tensors[-1].record
        length = last.end - first.header_offset
        buffer = self._batch_buffers.take() if length <= _BATCH else memoryview(bytearray(length))
        started = time.monotonic()
        self._source.read_into(first.header_offset, buffer[:length])
        count = sum(tensor.record.length for tensor in job.tensors)
        self._progress.stage("fetch", count, time.monotonic() - started)
        self._soon(partial(self._open_batch, job.tensors, buffer))

    def _soon(self, opening: Callable[[], None]) -> None:
        """Now, or by one of the threads that open what all connections receive."""
        if self.apart:
            self._received.put(opening)
        else:
            opening()

    def _open_batch(self, tensors: tuple[Pending, ...], data: memoryview) -> None:
        first = tensors[0].record.header_offset
        for tensor in tensors:
            record = tensor.record
            begin = record.header_offset - first
            body = begin + record.header_length
            self._opener.take_header(tensor, data[begin:body])
            self._take(tensor, 0, data[body : body + record.length])
        if len(data) == _BATCH:
            self._batch_buffers.give_back(data)

    def _do_parts(self, job: Job[Pending]) -> None:
        """A run of parts of a large tensor, in one request, each opened as soon as it is there."""
        (tensor,) = job.tensors
        record, first = tensor.record, job.next
        header = memoryview(bytearray(record.header_length if first == 0 else 0))
        lengths = [len(header), *(_part_length(record, part) for part in range(first, job.stop))]
        offset = record.data_offset + first * PART_BYTES - len(header)
        buffer = header
        started = time.monotonic()

        def memory(number: int) -> memoryview:
            nonlocal buffer
            if number == 0:
                return header
            start = (first + number - 1) * PART_BYTES
            if self._direct:
                buffer = tensor.view[start : start + lengths[number]]
                populate(buffer)
            elif self.apart or number == 1:
                buffer = self._buffers.take()
            return buffer[: lengths[number]]

        def arrived(number: int) -> bool:
            nonlocal started
            if number == 0:
                if header:
                    self._opener.take_header(tensor, header)
                return not self._stopped.is_set()
            count, part = lengths[number], first + number - 1
            self._progress.stage("fetch", count, time.monotonic() - started)
            if self.apart:
                self._soon(partial(self._open_buffer, tensor, part, buffer, count))
            else:
                self._open_part(tensor, part, buffer[:count])
            started = time.monotonic()
            return self._schedule.passed(job) and not self._stopped.is_set()

        self._source.read_parts(offset, lengths, memory, arrived)
        if not self._direct and not self.apart:
            self._buffers.give_back(buffer)

    def _open_buffer(self, tensor: Pending, part: int, buffer: memoryview, count: int) -> None:
        if not tensor.header_known.wait(_HEADER_SECONDS) and not self._stopped.is_set():
            # Its header is slow; others need not wait for it.
            self._soon(partial(self._open_buffer, tensor, part, buffer, count))
            return
        self._open_part(tensor, part, buffer[:count])
        self._buffers.give_back(buffer)

    def double(self) -> bool:
        """Read what another connection is slow with a second time; whoever is first opens it."""
        # What is received where it belongs must not be written by two.
        found = None if self._direct else self._schedule.double(_DOUBLE_SECONDS)
        if found is None:
            return False
        tensor, part = found
        record = tensor.record
        if part == 0 and not tensor.header_known.is_set():
            header = self._source.read(record.header_offset, record.header_length)
            self._opener.take_header(tensor, memoryview(header))
        if tensor.header_known.is_set():
            buffer = self._buffers.take()
            data = buffer[: _part_length(record, part)]
            self._source.read_into(record.data_offset + part * PART_BYTES, data)
            self._open_part(tensor, part, data)
            self._buffers.give_back(buffer)
        return True

    def _open_part(self, tensor: Pending, part: int, data: memoryview) -> None:
        with tensor.lock:
            if part in tensor.opened:
                return  # the other connection was first
            tensor.opened.add(part)
        # The job with the header was given out before this one, and waits for nobody.
        while not tensor.header_known.wait(0.1):
            if self._stopped.is_set():
                return
        self._take(tensor, part * PART_BYTES, data)

    def _take(self, tensor: Pending, start: int, data: memoryview) -> None:
        if self._opener.take(tensor, start, data):
            self._finished(tensor)


def _part_length(record: TensorRecord, part: int) -> int:
    return min(PART_BYTES, record.length - part * PART_BYTES)
