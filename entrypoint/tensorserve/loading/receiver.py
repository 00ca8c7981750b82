"""How does one thread read one job: receive its spans, and hand them to the assembler?

What has to be decrypted, or copied to a GPU, is received into a buffer that the thread keeps, small
enough for the processor's cache, and assembled from there by the same thread: nothing waits for
another thread. Plain tensors for host memory are received where they belong.
"""

from __future__ import annotations

import mmap
import threading
import time
from collections.abc import Callable

from tensorserve.linux import populate
from tensorserve.loading.assembler import Assembler
from tensorserve.loading.counters import LoadProgress
from tensorserve.loading.pending_tensor import PendingTensor
from tensorserve.loading.scheduler import Job, Scheduler
from tensorserve.loading.span_table import functions
from tensorserve.loading.spans import Span
from tensorserve.loading.table_job import TableJob
from tensorserve.loading.tuning import DEFAULTS
from tensorserve.sources import Filling, Source
from tensorserve.telemetry.names import Stage


def strip_bytes(remote: bool, direct: bool) -> int:
    """The longest span that a thread receives into its own buffer; divides `part_bytes`."""
    # As a whole, a chunk is decrypted with less work, and out of the same cache.
    return DEFAULTS.strip_bytes if remote or direct else DEFAULTS.part_bytes


class Receiver:
    """Reads jobs. Thread-safe. `finished` is called with each tensor that has become complete."""

    def __init__(
        self,
        source: Source,
        assembler: Assembler,
        scheduler: Scheduler[PendingTensor],
        progress: LoadProgress,
        *,
        direct: bool,
        strip: int,
        finished: Callable[[PendingTensor], None],
        in_c: bool = False,
    ) -> None:
        """`direct`: large tensors are received in their own memory, since nothing is encrypted.

        `strip`: bytes of the longest span that is received elsewhere. `in_c`: C assembles, where
        it is there. It needs tensors that are in host memory as a whole.
        """
        self._source = source
        self._assembler = assembler
        self._scheduler = scheduler
        self._progress = progress
        self._direct = direct
        self._strip = strip
        self._finished = finished
        self._own = threading.local()
        self._claiming = threading.Lock()
        self._stopped = threading.Event()
        self.in_c = in_c and functions() is not None
        """Whether C puts tensors together, in their `PendingTensor.in_c`."""
        self._running: list[TableJob] = []

    def stop(self) -> None:
        """End all jobs at their next span."""
        self._stopped.set()
        for running in list(self._running):
            running.stop()

    def read(self, job: Job[PendingTensor]) -> None:
        """Read a job in one request, and assemble each span as soon as it has arrived."""
        if self.in_c:
            self._read_in_c(job)
            return
        spans = job.spans[job.next : job.stop]
        buffer = memoryview(b"")
        started = time.monotonic()

        def memory(number: int) -> memoryview:
            nonlocal buffer
            buffer = self._memory(spans[number])
            return buffer

        def arrived(number: int) -> bool:
            nonlocal started
            span = spans[number]
            self._progress.stage(Stage.FETCH, span.data_bytes, time.monotonic() - started)
            self._assemble(span, buffer)
            started = time.monotonic()
            return self._scheduler.passed(job) and not self._stopped.is_set()

        lengths = [span.length for span in spans]
        self._source.read_parts(spans[0].offset, Filling(lengths, memory, arrived))

    def _read_in_c(self, job: Job[PendingTensor]) -> None:
        """As `read`; Python is called for headers only, and counts afterwards."""
        began = time.monotonic()
        table = TableJob(
            job,
            self._buffer(),
            self._assembler,
            self._progress,
            placed=self._direct,
            assemble=self._assemble_claimed,
            finished=self._finished,
        )
        self._scheduler.received_by(table.table, job)
        with self._claiming:
            self._running.append(table)
        try:
            if not self._stopped.is_set():
                self._source.read_parts(table.offset, table.table)
        finally:
            with self._claiming:
                self._running.remove(table)
            self._scheduler.received(job, time.monotonic() - began)
        table.count()
        table.report(time.monotonic() - began)

    def count(self) -> None:
        """Look at what C has received so far: it may have completed a tensor."""
        with self._claiming:
            running = list(self._running)
        for each in running:
            each.count()

    def hedge(self) -> bool:
        """Hedged read: read the span of a straggler a second time; the first copy is assembled.

        False where there is no straggler.
        """
        self.count()  # what has come may be what the consumer waits for
        straggler = self._scheduler.straggler()
        if straggler is None:
            return False
        span, thread = straggler
        if self.in_c and span.claim is None:
            return False  # its thread has not begun
        if self._is_placed(span) and not self._may_place(span):
            # Two must not write to the tensor's memory: the same thread has to send a new request.
            self._source.hurry(thread)
            return True
        buffer = self._memory(span)
        self._source.read_into(span.offset, buffer)
        self._assemble(span, buffer)
        return True

    def _memory(self, span: Span[PendingTensor]) -> memoryview:
        """Where a span is received: the thread's own buffer, or the tensor's memory."""
        if self._is_placed(span) and (self.in_c or self._may_place(span)):
            piece = span.pieces[0]
            place = piece.target.view[piece.start : piece.start + piece.length]
            populate(place)
            return place
        return self._buffer()[: span.length]

    def _buffer(self) -> memoryview:
        """The thread's own."""
        strip: memoryview | None = getattr(self._own, "strip", None)
        if strip is None:
            # Its pages come as C writes them. A bytearray's are zeroed here, with Python's lock.
            strip = self._own.strip = memoryview(mmap.mmap(-1, self._strip, mmap.MAP_PRIVATE))
        return strip

    def _is_placed(self, span: Span[PendingTensor]) -> bool:
        """Whether a span is received in its tensor's memory."""
        return self._direct and len(span.pieces) == 1 and not span.pieces[0].header

    def _may_place(self, span: Span[PendingTensor]) -> bool:
        """Whether this thread is the one that receives it there; the first one that asks is."""
        if span.claim is not None:
            return span.claim()
        me = threading.get_ident()
        with self._claiming:
            if span.placed_by is None:
                span.placed_by = me
            return span.placed_by == me

    def _assemble(self, span: Span[PendingTensor], buffer: memoryview) -> None:
        placed = self._is_placed(span)
        if placed and not self.in_c and not self._may_place(span):
            return  # another thread has received it in its place
        if span.claim is not None:
            first = placed or span.claim()  # one that is placed was claimed before it was read
        else:
            with self._claiming:
                first, span.taken = not span.taken, True
        if first:  # else the other connection's copy came first
            self._assemble_claimed(span, buffer)

    def _assemble_claimed(self, span: Span[PendingTensor], buffer: memoryview) -> None:
        placed = self._is_placed(span)
        at = 0
        for piece in span.pieces:
            data = buffer[at : at + piece.length]
            at += piece.length
            if piece.header:
                complete = self._assembler.take_header(piece.target, piece.start, data)
            else:
                complete = self._assembler.take(piece.target, piece.start, data, placed=placed)
            if complete:
                self._finished(piece.target)
