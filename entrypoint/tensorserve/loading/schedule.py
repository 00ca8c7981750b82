"""In which pieces is a .tensors file read: which job does a free connection get next?

Jobs are ranges of the file, in file order, whatever tensors stand there. Behind a network they end
at multiples of 8 MiB: object stores keep an object in pieces of 4 MiB, 8 MiB or more, and a request
that begins or ends within one may have all of it read (SeaweedFS loses a third of its rate). Within
a job, spans are received one by one: a strip or a part of a large tensor, or small neighbours
together. Towards the end jobs get shorter, and a free connection takes the rest of another's job:
one slow connection delays nothing.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from tensorserve.format import TensorRecord
from tensorserve.loading.lateness import late_after, usual_with

# tensorizer's cipher chunks have this size, so that a part can be opened when it is there.
PART_BYTES = 2 * 1024**2
# A request's latency is small beside it (8 MiB at S3's 90 MB/s a connection take 90 ms).
JOB_BYTES = 8 * 1024**2
# Not less: what is left of a slow one's job is taken by others (`steal`).
_LEAST_BYTES = 4 * 1024**2
# So much more room for jobs on their way than they take, else they get shorter: what has arrived
# waits for what stands before it.
_ROOMY = 1.5
# A job with one span to come is left alone for so long: a second request costs more than it saves.
_PATIENCE = 0.5
# Tensors up to that size are received together with their neighbours.
SMALL_BYTES = 256 * 1024
# What nobody wants is read all the same where it is no more than that.
_GAP = 64 * 1024

# After every offset.
END = 2**63 - 1

Target = TypeVar("Target")


@dataclass(frozen=True, slots=True)
class Piece(Generic[Target]):
    """Bytes [`start`, `start` + `length`) of a tensor's data, or of its header."""

    target: Target
    start: int
    length: int
    header: bool


@dataclass(eq=False, slots=True)
class Span(Generic[Target]):
    """Bytes of the file that are received at once. No pieces: nobody's."""

    offset: int
    length: int
    pieces: list[Piece[Target]]
    small: bool
    """Whether more small pieces may join it."""
    opened: bool = False
    """Whether some thread opens it or has opened it: it may be read twice."""
    placed_by: int | None = None
    """The thread that receives it where it belongs: only one may."""

    @property
    def data_bytes(self) -> int:
        """Of tensors, without headers."""
        return sum(piece.length for piece in self.pieces if not piece.header)


@dataclass(eq=False, slots=True)
class Job(Generic[Target]):
    """What one connection does: `spans` [`next`, `stop`), which stand one after the other."""

    spans: list[Span[Target]]
    next: int
    stop: int
    began: float = field(default_factory=lambda: time.monotonic())
    """When the span that is on its way was begun; monotonic seconds."""
    doubled: bool = False
    """Whether another connection reads the span on its way as well."""
    thread: int = field(default_factory=threading.get_ident)
    """That does it."""

    @property
    def place(self) -> int:
        """Where the next byte that it reads stands in the file."""
        return self.spans[self.next].offset if self.next < len(self.spans) else END


class Schedule(Generic[Target]):
    """Gives out jobs. Thread-safe.

    `admit(record)` makes of a tensor, in file order, what the pieces name as their target; None
    where there is no room for it yet. It must not wait: nobody else could claim or steal
    meanwhile. `room()`: bytes that all jobs together may have on their way at the moment; beyond
    that `admit` gives None. `aligned`: jobs end at multiples of their size in the file, else where
    a span ends. `strip_bytes`: the most that is received at once, `placed_bytes` of a tensor's own
    bytes alone.
    """

    def __init__(
        self,
        records: Iterable[TensorRecord],
        admit: Callable[[TensorRecord], Target | None],
        room: Callable[[], int] = lambda: END,
        *,
        aligned: bool = False,
        strip_bytes: int = PART_BYTES,
        placed_bytes: int = PART_BYTES,
    ) -> None:
        assert PART_BYTES % placed_bytes == 0
        self._strip_bytes = strip_bytes
        self._placed_bytes = placed_bytes
        self._todo = deque(records)
        self._bytes_left = sum(record.length for record in self._todo)
        self._admit = admit
        self._room = room
        self._aligned = aligned
        self._claiming = threading.Lock()
        self._lock = threading.Lock()
        self._running: list[Job[Target]] = []
        self._usual = 0.0
        """Seconds from a span's begin to its end, the latest weighing most."""
        self._target: Target | None = None
        """Of the first tensor in _todo, where it is begun."""
        self._position = self._todo[0].header_offset if self._todo else END
        """Of the first byte that no job has."""

    def claim(self, connections: int) -> Job[Target] | None:
        """The next job where `connections` share the work.

        None when all is given out, or where there is no room for what comes next.
        """
        with self._claiming:
            # At the end each connection gets its share, so that none is left alone with a long job.
            # And all of them have to fit into the memory.
            share = min(self._bytes_left, self._room() / _ROOMY) / connections
            spans = self._cut(JOB_BYTES if share >= JOB_BYTES else _LEAST_BYTES)
            if not spans:
                return None
            job = Job(spans, 0, len(spans))
            with self._lock:
                self._running.append(job)
                self._position = self._next_position(spans)
            return job

    @property
    def all_given_out(self) -> bool:
        """Whether no more jobs can be claimed, whatever the room."""
        return not self._todo

    def steal(self) -> Job[Target] | None:
        """The last spans of a job that has not come to them: half of what the longest has left."""
        with self._lock:
            victim = max(self._running, key=lambda j: j.stop - j.next, default=None)
            # The span at `next` is on its way.
            left = victim.stop - victim.next - 1 if victim is not None else 0
            if victim is None or left < 1:
                return None
            if left == 1 and time.monotonic() - victim.began < _PATIENCE:
                return None
            middle = victim.stop - (left + 1) // 2
            job = Job(victim.spans, middle, victim.stop)
            victim.stop = middle
            self._running.append(job)
            return job

    def late(self, older_than: float) -> tuple[Span[Target], int] | None:
        """(a span that has been on its way for that many seconds and much longer than is usual, the
        thread that waits for it); each once.
        """
        now = time.monotonic()
        with self._lock:
            older_than = late_after(self._usual, older_than)
            for job in self._running:
                if job.next < job.stop and not job.doubled and now - job.began > older_than:
                    job.doubled = True
                    return job.spans[job.next], job.thread
        return None

    def passed(self, job: Job[Target]) -> bool:
        """The span at `job.next` has arrived; False where the rest of the job is another's."""
        with self._lock:
            now = time.monotonic()
            self._usual = usual_with(self._usual, now - job.began)
            job.next += 1
            job.began = now
            job.doubled = False
            return job.next < job.stop

    def end(self, job: Job[Target]) -> None:
        """The job's connection is done with it."""
        with self._lock:
            self._running.remove(job)

    def oldest(self, job: Job[Target]) -> bool:
        """Whether no other job has an earlier byte of the file to read."""
        with self._lock:
            return all(job.place <= other.place for other in self._running)

    def low_water(self) -> int:
        """The first offset in the file that is still needed; a huge one when nothing is."""
        with self._lock:
            return min([self._position, *(job.place for job in self._running)])

    def _next_position(self, spans: list[Span[Target]]) -> int:
        if not self._todo:
            return END
        if self._target is None:
            return self._todo[0].header_offset
        return spans[-1].offset + spans[-1].length

    def _cut(self, size: int) -> list[Span[Target]]:
        """The next `size` bytes or so; none where not even the first tensor has room."""
        spans: list[Span[Target]] = []
        limit = END
        while self._todo:
            record = self._todo[0]
            position = self._position if not spans else spans[-1].offset + spans[-1].length
            if self._target is None:
                gap = record.header_offset - position if spans else 0
                if gap > _GAP:
                    break
                self._target = self._admit(record)
                if self._target is None:
                    break
                if gap:
                    spans.append(Span(position, gap, [], small=False))
                position = record.header_offset
            if not spans:
                limit = (position // size + 1) * size if self._aligned else position + size
            for piece in self._pieces(record, self._target, position, limit):
                self._add(spans, record, piece)
                if not piece.header:
                    self._bytes_left -= piece.length
            end = spans[-1].offset + spans[-1].length
            if end == record.end:
                self._todo.popleft()
                self._target = None
            if end >= limit:
                break
        return spans

    def _pieces(
        self, record: TensorRecord, target: Target, position: int, limit: int
    ) -> Iterable[Piece[Target]]:
        """Of one tensor, from `position` in the file to `limit`, or to where a span ends there."""
        while position < min(record.end, limit):
            header = position < record.data_offset
            begin = record.header_offset if header else record.data_offset
            size = self._placed_bytes
            number = (position - record.data_offset) // size
            # A header, too, may be longer than what is received at once.
            end = (
                min(record.data_offset, position + self._strip_bytes)
                if header
                else min(record.data_offset + (number + 1) * size, record.end)
            )
            if self._aligned:
                end = min(end, limit)
            yield Piece(target, position - begin, end - position, header)
            position = end

    def _add(self, spans: list[Span[Target]], record: TensorRecord, piece: Piece[Target]) -> None:
        """To the last span, where both are small; else in one of its own."""
        offset = piece.start + (record.header_offset if piece.header else record.data_offset)
        small = record.length <= SMALL_BYTES
        last = spans[-1] if spans else None
        most = self._strip_bytes
        if last is not None and small and last.small and last.length + piece.length <= most:
            last.pieces.append(piece)
            last.length += piece.length
        else:
            spans.append(Span(offset, piece.length, [piece], small))
