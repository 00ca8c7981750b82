"""How one job is done: its bytes received, and opened where they belong.

From a file the thread that received a span opens it, straight out of the processor's cache. Behind
a network there are more connections than processors: there `open_what_comes` does it, in one thread
a processor.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from functools import partial
from queue import SimpleQueue

from tensorserve.linux import populate
from tensorserve.loading.memory import Buffers
from tensorserve.loading.opener import Opener, Pending
from tensorserve.loading.progress import LoadProgress
from tensorserve.loading.schedule import PART_BYTES, SMALL_BYTES, Job, Schedule, Span
from tensorserve.sources import Source

# A span that takes this long while another connection has nothing to do is read a second time.
_DOUBLE_SECONDS = 0.5
# For a header that has not come yet, before others get their turn.
_HEADER_SECONDS = 0.02


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
        # The rest is for chunks that two jobs share, of which the opener has one half.
        self.buffers = max(4, memory_limit * 2 // 3 // PART_BYTES)
        self._buffers = Buffers(PART_BYTES, self.buffers)
        self._received: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._claiming = threading.Lock()
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
        self._received.put(None)

    def do(self, job: Job[Pending]) -> None:
        """In one request; each span is opened as soon as it is there."""
        spans = job.spans[job.next : job.stop]
        buffer = memoryview(b"")
        started = time.monotonic()

        def memory(number: int) -> memoryview:
            nonlocal buffer
            buffer = self._memory(spans[number], lambda: self._schedule.oldest(job))
            return buffer[: spans[number].length]

        def arrived(number: int) -> bool:
            nonlocal started
            span = spans[number]
            self._progress.stage("fetch", span.data_bytes, time.monotonic() - started)
            self._soon(partial(self._open, span, buffer))
            started = time.monotonic()
            return self._schedule.passed(job) and not self._stopped.is_set()

        self._source.read_parts(spans[0].offset, [span.length for span in spans], memory, arrived)

    def double(self) -> bool:
        """Read what another connection is slow with a second time; whoever is first opens it."""
        # What is received where it belongs must not be written by two.
        span = None if self._direct else self._schedule.double(_DOUBLE_SECONDS)
        if span is None:
            return False
        buffer = self._memory(span, lambda: True)
        self._source.read_into(span.offset, buffer[: span.length])
        self._soon(partial(self._open, span, buffer))
        return True

    def _memory(self, span: Span[Pending], urgent: Callable[[], bool]) -> memoryview:
        """Where a span is received: a buffer, or where its tensor belongs.

        A buffer is waited for, unless it is `urgent`: what waits in all others may need this span's
        header.
        """
        if self._places(span):
            piece = span.pieces[0]
            place = piece.target.view[piece.start : piece.start + piece.length]
            populate(place)
            return place
        if span.length <= SMALL_BYTES:
            return memoryview(bytearray(span.length))
        return self._buffers.take(urgent)

    def _places(self, span: Span[Pending]) -> bool:
        return self._direct and len(span.pieces) == 1 and not span.pieces[0].header

    def _soon(self, opening: Callable[[], None]) -> None:
        """Now, or by one of the threads that open what all connections receive."""
        if self.apart:
            self._received.put(opening)
        else:
            opening()

    def _open(self, span: Span[Pending], buffer: memoryview) -> None:
        if span.pieces and not self._header_known(span):
            if not self._stopped.is_set():
                # Its header is slow; others need not wait for it.
                self._soon(partial(self._open, span, buffer))
            return
        with self._claiming:
            first, span.opened = not span.opened, True
        if first:  # else the other connection was
            self._open_pieces(span, buffer)
        if len(buffer) == PART_BYTES and not self._places(span):
            self._buffers.give_back(buffer)

    def _open_pieces(self, span: Span[Pending], buffer: memoryview) -> None:
        placed = self._places(span)
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

    def _header_known(self, span: Span[Pending]) -> bool:
        """Of the span's first tensor, which may stand in another one; the others bring theirs."""
        first = span.pieces[0]
        if first.header:
            return True
        if self.apart:
            return first.target.header_known.wait(_HEADER_SECONDS)
        # The job with the header was given out before this one, and waits for nobody.
        while not first.target.header_known.wait(0.1):
            if self._stopped.is_set():
                return False
        return True
