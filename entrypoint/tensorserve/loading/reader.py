"""How one job is done: its bytes received, and opened where they belong, by one thread.

What is sealed is received into a strip of memory that the thread keeps, small enough for the
processor's cache, and opened from there: nothing waits for another thread. What is plain is
received where it belongs.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from tensorserve.linux import populate
from tensorserve.loading.lateness import LATE_SECONDS
from tensorserve.loading.opener import Opener, Pending
from tensorserve.loading.progress import LoadProgress
from tensorserve.loading.schedule import PART_BYTES, Job, Schedule, Span
from tensorserve.sources import Source

# What a thread receives at once before it opens it: behind a network, where it waits for each strip
# beside many others, small enough that all of them stay in a cache.
_STRIP_BYTES = 1024**2


def strip_bytes(remote: bool, direct: bool) -> int:
    """The most that a thread receives elsewhere than where it belongs; divides PART_BYTES."""
    # In one piece, a chunk is opened with less work, and out of the same cache.
    return _STRIP_BYTES if remote or direct else PART_BYTES


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
        strip: int,
        finished: Callable[[Pending], None],
    ) -> None:
        """`direct`: large tensors are received where they belong, since nothing is to be opened.

        `strip`: bytes of the longest span that is received elsewhere.
        """
        self._source = source
        self._opener = opener
        self._schedule = schedule
        self._progress = progress
        self._direct = direct
        self._strip = strip
        self._finished = finished
        self._own = threading.local()
        self._claiming = threading.Lock()
        self._stopped = threading.Event()

    def stop(self) -> None:
        """End all jobs at their next span."""
        self._stopped.set()

    def do(self, job: Job[Pending]) -> None:
        """In one request; each span is opened as soon as it is there."""
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
            self._progress.stage("fetch", span.data_bytes, time.monotonic() - started)
            self._open(span, buffer)
            started = time.monotonic()
            return self._schedule.passed(job) and not self._stopped.is_set()

        self._source.read_parts(spans[0].offset, [span.length for span in spans], memory, arrived)

    def help(self) -> bool:
        """With what another connection is late: read it a second time, whoever is first opens it.

        False where nothing is late.
        """
        late = self._schedule.late(LATE_SECONDS)
        if late is None:
            return False
        span, thread = late
        if self._places(span) and not self._may_place(span):
            # Two must not write where it belongs: it has to be asked for anew by the same thread.
            self._source.hurry(thread)
            return True
        buffer = self._memory(span)
        self._source.read_into(span.offset, buffer)
        self._open(span, buffer)
        return True

    def _memory(self, span: Span[Pending]) -> memoryview:
        """Where a span is received: the thread's own strip, or where its tensor belongs."""
        if self._places(span) and self._may_place(span):
            piece = span.pieces[0]
            place = piece.target.view[piece.start : piece.start + piece.length]
            populate(place)
            return place
        strip: memoryview | None = getattr(self._own, "strip", None)
        if strip is None:
            strip = self._own.strip = memoryview(bytearray(self._strip))
        return strip[: span.length]

    def _places(self, span: Span[Pending]) -> bool:
        return self._direct and len(span.pieces) == 1 and not span.pieces[0].header

    def _may_place(self, span: Span[Pending]) -> bool:
        """Whether this thread is the one that receives it where it belongs."""
        me = threading.get_ident()
        with self._claiming:
            if span.placed_by is None:
                span.placed_by = me
            return span.placed_by == me

    def _open(self, span: Span[Pending], buffer: memoryview) -> None:
        placed = self._places(span)
        if placed and not self._may_place(span):
            return  # it was read for nothing
        with self._claiming:
            first, span.opened = not span.opened, True
        if not first:  # the other connection was
            return
        at = 0
        for piece in span.pieces:
            data = buffer[at : at + piece.length]
            at += piece.length
            if piece.header:
                complete = self._opener.take_header(piece.target, piece.start, data)
            else:
                complete = self._opener.take(piece.target, piece.start, data, placed=placed)
            if complete:
                self._finished(piece.target)
